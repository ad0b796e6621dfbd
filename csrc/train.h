// The convolutions of a training step over a batch, forward and backward. Tensors are NHWC without gaps, of T: float,
// or bf16 with sums, norms and gradients of parameters in float32 and products of bf16 in 1x1 layers alone.
//
// Work is divided by the number of threads alone, and partial sums are added in order: the same bits every time at one
// instruction set and number of threads. All of them throw std::bad_alloc.
#pragma once

#include "types.h"

namespace mnv2 {

enum class TrainKind { pointwise, depthwise, stem };

struct TrainShape {
    TrainKind kind; // pointwise; depthwise 3x3 with padding 1; stem: 3x3 of stride 2 with padding 1 from 3 channels
    int n, h, w;    // of the input
    int cin, cout;
    int stride;
    std::ptrdiff_t strides[4]; // of a stem's x, N C H W in elements; any other x is without gaps

    int out_h() const { return (h - 1) / stride + 1; }
    int out_w() const { return (w - 1) / stride + 1; }
    std::ptrdiff_t in_pixels() const { return static_cast<std::ptrdiff_t>(n) * h * w; }
    std::ptrdiff_t out_pixels() const { return static_cast<std::ptrdiff_t>(n) * out_h() * out_w(); }
};

// A 1x1 layer without memory of its raw output, which whoever reads it makes again: conv(x) for x [N, H, W, cin].
template <class T> struct TrainExpand {
    const T *x;
    const T *weight; // torch's
    int cin;
    const double *moments; // of x, as train_input_moments gives them; null: nobody takes the batch's, and zeros do
};

// The gradients of an expansion as far as they are known before its norm's sums are, see train_expand_finish. g' is the
// gradient of its normalized output, masked as ReLU6 says. dx is not rounded yet: its mean, which the rest takes away,
// may be large, and rounding would go one way everywhere.
struct TrainExpandGradient {
    float *dx; // [N, H, W, cin], scale * g' through the weight; or null
    float *dw; // [C][cin], g' * (x - mean) over all pixels; or null
};

// z = conv(act(x)). The weight is torch's, of T in 1x1 layers and of float in others. A stem's x is float.
template <class T> struct TrainForward {
    TrainShape shape;
    const void *x;
    Norm in;
    const void *weight;
    T *z;
    double *sums;                           // [2][cout]: of z and of its square over all pixels; or null
    const TrainExpand<T> *expand = nullptr; // makes x; of a depthwise layer
};

// Gradients from g, that of what follows z: dz is as GradientOf makes it of g and z.
template <class T> struct TrainBackward {
    TrainShape shape;
    const void *x;
    Norm in;
    const void *weight;
    const T *z;
    const T *g;
    Norm out; // its relu6: g is yet to be masked
    const float *of_g;
    const float *of_z;
    const float *constant;
    const T *residual; // is added to dx; or null; pointwise only
    T *dx;             // the gradient of x's normalized value, before its ReLU6; or null; not of a stem
    double *sums;      // [2][cin]: of dx, and of dx * (x - in.mean), where x is normalized; or null
    float *dw;         // or null
    const TrainExpand<T> *expand = nullptr;        // makes x; of a depthwise layer
    const TrainExpandGradient *expanded = nullptr; // of it; null where no sums are wanted either
};

// The rest of an expansion's gradients. Its raw output's is scale * g' + of_z * z + constant, and z = weight * x, so
// that nothing but the first term needs a pixel of z: what the others add to dw follows from the moments of x, and what
// they add to dx is a 1x1 convolution of x from `cin` channels to as many. The constant is what makes the sum over all
// pixels zero.
template <class T> struct TrainExpandFinish {
    TrainExpand<T> expand;
    std::ptrdiff_t pixels;
    int channels;
    const double *sums; // [channels]: of g'
    const float *scale;
    const float *of_z;
    const T *residual;         // is added to dx; or null
    TrainExpandGradient begun; // its dw is made the weight's gradient; its dx, which is written to, has no use then
    T *dx;                     // or null; may be that of `begun`
};

// y = act(z) + residual
template <class T> struct TrainActivate {
    const T *z;
    Norm norm;
    const T *residual; // or null
    T *y;
    std::ptrdiff_t pixels;
    int channels;
};

// sums [2][channels]: of g', and of g' * (z - norm.mean); g' is g masked as norm.relu6 says.
template <class T> struct TrainSums {
    const T *g;
    const T *z;
    Norm norm;
    double *sums;
    std::ptrdiff_t pixels;
    int channels;
};

// Batch norm of one layer, [channels] each.
struct TrainNorm {
    double *moments;           // [2]: mean and biased variance
    const float *gamma, *beta; // or null: ones and zeros
    double eps;
    float *norm; // [3]: mean, scale, shift, as Norm has them
    int channels;
};

// The same for the way back.
struct TrainNormGradient {
    const double *sums; // [2]: as TrainSums has them
    const double *moments;
    const float *gamma;
    double eps;
    std::ptrdiff_t pixels; // 0: the moments are not those of the batch
    const float *norm;
    float *coefficients; // [3]: of_g, of_z, constant
    float *dgamma, *dbeta;
    int channels;
};

// Makes the moments out of sums over that many pixels, unless it is 0, and then the norm.
void train_norm(const TrainNorm &n, std::ptrdiff_t pixels);
void train_norm_gradient(const TrainNormGradient &n);

// Running statistics, [channels] each, moved towards a batch's of so many pixels by a share.
void train_running(const double *moments, std::ptrdiff_t pixels, double share, float *mean, float *variance,
                   int channels);

template <class T> void train_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads);
template <class T> void train_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads);
// moments [1 + channels][channels]: the mean of x [pixels][channels], and sums of products of two channels less theirs.
template <class T>
void train_input_moments(const KernelTable &kernels, const T *x, std::ptrdiff_t pixels, int channels, double *moments,
                         int threads);
// sums [2][channels] as TrainForward has them, of an expansion over so many pixels.
template <class T>
void train_expand_sums(const TrainExpand<T> &expand, std::ptrdiff_t pixels, int channels, double *sums);
template <class T> void train_expand_finish(const KernelTable &kernels, const TrainExpandFinish<T> &f, int threads);
template <class T> void train_activate(const KernelTable &kernels, const TrainActivate<T> &a, int threads);
template <class T> void train_sums(const KernelTable &kernels, const TrainSums<T> &s, int threads);

} // namespace mnv2
