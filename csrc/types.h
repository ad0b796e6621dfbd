// Plain structs shared by the kernels, which are compiled once per ISA, and their callers, which are not.
//
// Activations are NHWC: a pixel is `ld` elements away from the next one and holds its channels one after another.
// Counts are in elements, never in bytes. A kernel never reads or writes a channel past the last. Sums are float32
// whatever the elements are, and so are biases.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnv2 {

// bfloat16, the upper half of a float32: storage only.
struct bf16 {
    std::uint16_t bits;
};

// Every internal buffer starts on a cache line and pads its channels to this many, the widest vector of floats.
constexpr int kChannelPad = 16;
constexpr std::size_t kCacheLine = 64;
constexpr int kMaxPanel = 2 * kChannelPad; // output channels of a panel of weights, of any instruction set

// Inputs of a linear layer that are summed at a time, whole panels of them; their sums are then added in order. So the
// answer does not depend on who sums which, and a sum of 1280 keeps its digits.
constexpr int kPiece = 64;
constexpr int kStemTaps = 27;       // 3 rows x 3 columns x 3 colours
constexpr int kDepthwiseBlock = 10; // vectors per packed block of channels: 9 taps and the bias

// y[p, n] = act(bias[n] + sum_k x[p, k] * w[k, n]) + residual[p, n]; elements X of x, W of the weights, Y of y.
template <class X, class W = X, class Y = X> struct Pointwise {
    const X *x;
    std::ptrdiff_t x_ld;
    const W *weight;   // panels [cout / panel][cin][panel], see pack.h
    const float *bias; // padded to the panels; null: zero
    const Y *residual; // or null
    std::ptrdiff_t residual_ld;
    Y *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t pixels;
    int cin;
    int cout;
    int panel_begin; // the panels to compute
    int panel_end;
    bool relu6;
    bool accumulate = false;       // y holds the sum over earlier inputs, bias included: add to it
    const float *ahead = nullptr;  // what will be read soon, to be prefetched, or null
    std::ptrdiff_t ahead_size = 0; // its elements
};
using PointwiseArgs = Pointwise<float>;
using PointwiseBf16Args = Pointwise<bf16>;
using PointwiseBf16FloatArgs = Pointwise<bf16, bf16, float>;
using PointwiseMixedArgs = Pointwise<float, bf16, float>;

// One output row of the 3x3 stride-2 convolution from 3 colours.
struct StemArgs {
    const float *taps[kStemTaps]; // of output pixel 0; zero padding is in memory already
    std::ptrdiff_t step;          // from one output pixel's tap to the next one's
    const float *weight;          // panels [cout / panel][27][panel]
    const float *bias;            // or null
    float *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t pixels;
    int cout;
    bool relu6;
};

// Output rows of the 3x3 depthwise convolution with padding 1, elements Y. Pointers are to the first channel to
// compute.
template <class Y> struct Depthwise {
    // The (outputs - 1) * stride + 3 input rows from the one above the first output's on; null outside of the image,
    // which only the first and the last may be.
    const float *const *rows;
    std::ptrdiff_t x_ld;
    const float *weight; // blocks [channels / lanes][9 taps + bias][lanes]
    Y *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t y_row; // elements from one output row to the next
    int outputs;          // rows
    int width;            // of the input; the output's is (width - 1) / stride + 1
    int stride;
    int channels;
    bool relu6;
};
using DepthwiseArgs = Depthwise<float>;
using DepthwiseBf16Args = Depthwise<bf16>;

// sum[c] = sum over pixels of x[p, c]
struct PoolArgs {
    const float *x;
    std::ptrdiff_t x_ld;
    float *sum;
    std::ptrdiff_t pixels;
    int channels;
};

// y[p, c] = x[p, c] in the elements Y.
template <class X, class Y> struct Convert {
    const X *x;
    std::ptrdiff_t x_ld;
    Y *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t pixels;
    int channels;
};
using WidenArgs = Convert<bf16, float>;
using NarrowArgs = Convert<float, bf16>;

} // namespace mnv2

#include "int8_types.h"
#include "train_types.h"

namespace mnv2 {

// Bytes of a panel's hidden rows that are made at a time, in L1 (32 KB and more) beside the panel's weights and pixels:
// 8k to 16k measure alike, 36k costs 1% of an image.
constexpr std::size_t kRingBytes = 12 * 1024;

// Kernels that a row of isa.def has together.
enum KernelGroup : unsigned { kFp32 = 1, kBf16 = 2, kInt8 = 4, kTrain = 8, kTrainBf16 = 16 };

struct KernelTable {
    const char *isa;
    int lanes;                   // floats in a vector
    int panel;                   // output channels of a full panel of packed weights
    int tile_rows;               // pixels a full register tile computes at once
    int bf16_tile_rows;          // the same where bf16 is multiplied
    bool dot2;                   // bf16 multiplied as it lies beats widening it to float32 first
    std::size_t bf16_ring_bytes; // kRingBytes for bf16 activations
#define KERNEL(group, name, Args) void (*name)(const Args &);
#include "kernels.def"
#undef KERNEL
    double (*fma_peak)(std::int64_t iterations); // runs them, returns the multiply-accumulates done
    double (*dot2_peak)(std::int64_t iterations);
    double (*dot4_peak)(std::int64_t iterations);
};

} // namespace mnv2
