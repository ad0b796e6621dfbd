// Arguments of the kernels of a training step. types.h has the conventions and includes this.
//
// What a step keeps of a layer is its convolution's raw output z. Whoever reads z reads act(z * scale + shift), batch
// norm and ReLU6 applied on the way.
#pragma once

namespace mnv2 {

// How a raw output is read, a number for each channel. Without `scale` as it is; `mean` is near its mean, for sums of
// products with z that lose no digits to it.
struct Norm {
    const float *mean = nullptr;
    const float *scale = nullptr;
    const float *shift = nullptr;
    bool relu6 = false;
};

// y[p, c] = act(x[p, c]) + residual[p, c]
template <class X, class Y> struct Activate {
    const X *x;
    std::ptrdiff_t x_ld;
    Norm norm;
    const Y *residual; // or null
    std::ptrdiff_t residual_ld;
    Y *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t pixels;
    int channels;
};

using ActivateArgs = Activate<float, float>;
using ActivateWideArgs = Activate<bf16, float>;
using ActivateBf16Args = Activate<bf16, bf16>;

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
template <class G, class Z, class Y> struct GradientOf {
    const G *g;
    std::ptrdiff_t g_ld;
    const Z *z;
    std::ptrdiff_t z_ld;
    Norm norm;
    const float *of_g;
    const float *of_z;
    const float *constant;
    Y *dz;
    std::ptrdiff_t dz_ld;
    std::ptrdiff_t pixels;
    int channels;
};
using GradientArgs = GradientOf<float, float, float>;
using GradientWideArgs = GradientOf<bf16, bf16, float>;
using GradientBf16Args = GradientOf<bf16, bf16, bf16>;

// sum[c] = sum over pixels of x[p, c] - x[0, c], square[c] of its square.
struct MomentsArgs {
    const float *x;
    std::ptrdiff_t x_ld;
    float *sum;
    float *square;
    std::ptrdiff_t pixels;
    int channels;
};

// The same, and y[p, c] = x[p, c].
struct MomentsNarrowArgs {
    MomentsArgs moments;
    bf16 *y;
    std::ptrdiff_t y_ld;
};

// Adds a chunk's sums to those of all: of a number and another one, or where there is an origin those that MomentsArgs
// gives of `pixels` numbers less origin[c], as sums of the numbers and of their squares.
struct TotalsArgs {
    const float *first;
    const float *second;
    const float *origin; // or null
    std::ptrdiff_t pixels;
    double *total; // [2][channels]
    int channels;
};

// sum[c] = sum over pixels of g', dot[c] of g' * (z - mean); g' as in GradientArgs, also written to `masked`, or
// streamed: past the caches, so that it is not read first and pushes nothing out, in whole vectors on their boundaries.
template <class G, class Z> struct Sums {
    const G *g;
    std::ptrdiff_t g_ld;
    const Z *z;
    std::ptrdiff_t z_ld;
    Norm norm;
    Z *masked; // or null; may be g
    std::ptrdiff_t masked_ld;
    bool stream;
    float *sum;
    float *dot;
    std::ptrdiff_t pixels;
    int channels;
};
using SumsArgs = Sums<float, float>;
using SumsNarrowArgs = Sums<float, bf16>;
using SumsBf16Args = Sums<bf16, bf16>;

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

// dw[k, c] += x[k, p] * dz[p, c] over a piece of an output row of the stem, for tap k. `lines` are those above, at and
// below a pixel of a colour after those of another; in each, pixel p reads elements 2 p, 2 p + 1 and 2 p + 2.
struct StemWeightArgs {
    const float *lines[kStemTaps / 3];
    std::ptrdiff_t step; // from one element to the next one, 1 or 3
    const float *dz;
    float *dw; // [27][cout]
    std::ptrdiff_t pixels;
    int cout;
};

// act(x) in pairs of pixels [pixels / 2][y_ld][2], with a zero after an odd count's last.
struct PairsArgs {
    const bf16 *x;
    std::ptrdiff_t x_ld;
    Norm norm;
    bf16 *y;
    std::ptrdiff_t y_ld; // channels in whole vectors; what is beyond the last one is undefined
    std::ptrdiff_t pixels;
    int channels;
};

// dw[r, c] = sum over pixels of rows[p, r] * columns[p, c], added to dw where `accumulate`. Both are pairs of pixels as
// PairsArgs has them; all sizes are whole vectors.
struct WeightPairsArgs {
    const bf16 *rows;
    const bf16 *columns;
    bf16 *turned; // room for `rows`
    float *dw;    // [row_count][column_count]
    int row_count;
    int column_count;
    int pairs; // a multiple of 16 for matrix tiles
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
