// 3x3 depthwise convolution, one output row at a time.
//
// A block of `kLanes` channels keeps its nine weights in registers and moves along the row, kColumns outputs at a time:
// every loaded column serves up to three of them (3x3 stride 1: 18 loads for 36 multiply-adds, not 36).
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kColumns = 4;

struct DepthwiseRow {
    const float *rows[3];
    std::ptrdiff_t ld;
    float *y;
    std::ptrdiff_t y_ld;
    int left; // channels of this block that exist, kLanes or fewer
    bool relu6;

    Vec get(int kh, std::ptrdiff_t column) const {
        const float *p = rows[kh] + column * ld;
        return left >= kLanes ? load(p) : load_first(p, left);
    }
    void put(std::ptrdiff_t column, Vec a) const {
        float *p = y + column * y_ld;
        const Vec r = relu6 ? MNV2_ISA::relu6(a) : a;
        if (left >= kLanes)
            store(p, r);
        else
            store_first(p, r, left);
    }
};

// One output, rows kh0..kh1-1 and columns kw0..kw1-1 of its window inside the image.
template <int kh0, int kh1, int kw0, int kw1>
inline Vec one(const DepthwiseRow &row, const Vec (&w)[9], Vec acc, std::ptrdiff_t column) {
    for (int kh = kh0; kh < kh1; ++kh)
        for (int kw = kw0; kw < kw1; ++kw)
            acc = fma(row.get(kh, column + kw - 1), w[3 * kh + kw], acc);
    return acc;
}

// kColumns outputs whose windows lie inside the row, from output column `o` on.
template <int kh0, int kh1, int S>
inline void several(const DepthwiseRow &row, const Vec (&w)[9], Vec bias, std::ptrdiff_t o) {
    Vec acc[kColumns];
    for (int c = 0; c < kColumns; ++c)
        acc[c] = bias;
    for (int kh = kh0; kh < kh1; ++kh) {
#pragma GCC unroll 16
        for (int i = 0; i < (kColumns - 1) * S + 3; ++i) {
            const Vec x = row.get(kh, o * S - 1 + i);
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
                const int kw = i - c * S;
                if (kw >= 0 && kw < 3)
                    acc[c] = fma(x, w[3 * kh + kw], acc[c]);
            }
        }
    }
    for (int c = 0; c < kColumns; ++c)
        row.put(o + c, acc[c]);
}

template <int kh0, int kh1, int S> void depthwise_block(const DepthwiseRow &row, const float *weight, int width) {
    Vec w[9];
    for (int i = 0; i < 9; ++i)
        w[i] = load(weight + i * kLanes);
    const Vec bias = load(weight + 9 * kLanes);
    const std::ptrdiff_t outputs = (width - 1) / S + 1;
    // The last output whose right column exists; the first output never has a left one.
    const std::ptrdiff_t inside = (width - 2 + S) / S;
    if (width == 1) {
        row.put(0, one<kh0, kh1, 1, 2>(row, w, bias, 0));
        return;
    }
    row.put(0, one<kh0, kh1, 1, 3>(row, w, bias, 0));
    std::ptrdiff_t o = 1;
    for (; o + kColumns <= inside; o += kColumns)
        several<kh0, kh1, S>(row, w, bias, o);
    for (; o < inside; ++o)
        row.put(o, one<kh0, kh1, 0, 3>(row, w, bias, o * S));
    if (o < outputs)
        row.put(o, one<kh0, kh1, 0, 2>(row, w, bias, o * S));
}

template <int S> void depthwise_rows(const DepthwiseRow &row, const float *weight, int width) {
    if (row.rows[0] && row.rows[2])
        depthwise_block<0, 3, S>(row, weight, width);
    else if (row.rows[2])
        depthwise_block<1, 3, S>(row, weight, width);
    else if (row.rows[0])
        depthwise_block<0, 2, S>(row, weight, width);
    else
        depthwise_block<1, 2, S>(row, weight, width);
}

void depthwise(const DepthwiseArgs &a) {
    for (int block = a.block_begin; block < a.block_end; ++block) {
        const std::ptrdiff_t c = static_cast<std::ptrdiff_t>(block) * kLanes;
        DepthwiseRow row{{}, a.x_ld, a.y + c, a.y_ld, static_cast<int>(a.channels - c), a.relu6};
        for (int kh = 0; kh < 3; ++kh)
            row.rows[kh] = a.rows[kh] ? a.rows[kh] + c : nullptr;
        const float *weight = a.weight + c * kDepthwiseBlock;
        if (a.stride == 1)
            depthwise_rows<1>(row, weight, a.width);
        else
            depthwise_rows<2>(row, weight, a.width);
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
