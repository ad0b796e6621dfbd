// Arguments of the kernels of a training step. types.h has the conventions and includes this.
//
// What a step keeps of a layer is its convolution's raw output z. Whoever reads z reads act(z * scale + shift), batch
// norm and ReLU6 applied on the way.
#pragma once

namespace mnv2 {

// To stream is to write past the caches: what is written is not read first, and pushes nothing out. It takes whole
// vectors on their boundaries.

// How a raw output is read, a number for each channel. Without `scale` as it is; `mean` is near its mean, for sums of
// products with z that lose no digits to it.
struct Norm {
    const float *mean = nullptr;
    const float *scale = nullptr;
    const float *shift = nullptr;
    bool relu6 = false;
};

// y[p, c] = act(x[p, c]) + residual[p, c]
struct ActivateArgs {
    const float *x;
    std::ptrdiff_t x_ld;
    Norm norm;
    const float *residual; // or null
    std::ptrdiff_t residual_ld;
    float *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t pixels;
    int channels;
};

// The same in panels [channels / panel][capacity pixels][panel], the last one vector wide where one is enough; what is
// beyond the last channel is undefined.
struct PanelsArgs {
    const float *x;
    std::ptrdiff_t x_ld;
    Norm norm;
    float *y;
    std::ptrdiff_t capacity;
    std::ptrdiff_t pixels;
    int channels;
};

// The gradient of a raw output z: dz = of_g * g' + of_z * z + constant, a number of each for each channel; g' is g, or
// 0 where norm.relu6 and z's activation is flat.
struct GradientArgs {
    const float *g;
    std::ptrdiff_t g_ld;
    const float *z;
    std::ptrdiff_t z_ld;
    Norm norm;
    const float *of_g;
    const float *of_z;
    const float *constant;
    float *dz;
    std::ptrdiff_t dz_ld;
    std::ptrdiff_t pixels;
    int channels;
};

// sum[c] = sum over pixels of x[p, c] - x[0, c], square[c] of its square.
struct MomentsArgs {
    const float *x;
    std::ptrdiff_t x_ld;
    float *sum;
    float *square;
    std::ptrdiff_t pixels;
    int channels;
};

// sum[c] = sum over pixels of g', dot[c] of g' * (z - mean); g' as in GradientArgs, also written to `masked`, or
// streamed.
struct SumsArgs {
    const float *g;
    std::ptrdiff_t g_ld;
    const float *z;
    std::ptrdiff_t z_ld;
    Norm norm;
    float *masked; // or null; may be g
    std::ptrdiff_t masked_ld;
    bool stream;
    float *sum;
    float *dot;
    std::ptrdiff_t pixels;
    int channels;
};

// dw[o, i] = sum over pixels of dz[p, o] * a[p, i], added to dw where `accumulate`.
struct WeightGradientArgs {
    const float *dz;
    std::ptrdiff_t dz_ld;
    const float *a; // panels as PanelsArgs has them
    std::ptrdiff_t capacity;
    float *dw;
    std::ptrdiff_t dw_ld;
    std::ptrdiff_t pixels;
    int cin;
    int cout;
    bool accumulate;
};

// What one output row adds to the weights' gradient of a 3x3 depthwise convolution.
struct DepthwiseWeightArgs {
    const float *rows[3]; // of the activated input, from the one above on; null outside of the image
    std::ptrdiff_t x_ld;
    const float *dz;
    std::ptrdiff_t dz_ld;
    float *dw; // blocks [channels / lanes][9 taps][lanes], added to
    int width; // of the input
    int stride;
    int channels;
};

// One row of the input's gradient of a 3x3 depthwise convolution of stride 2.
struct DepthwiseInputArgs {
    const float *upper; // row of dz whose window has this row in its middle (even rows), or last
    const float *lower; // null for even rows; else the next row of dz, or null below the last
    bool odd;           // the row
    std::ptrdiff_t dz_ld;
    const float *weight; // blocks as Depthwise has them
    float *dx;
    std::ptrdiff_t dx_ld;
    int width; // of the input
    int channels;
};

} // namespace mnv2
