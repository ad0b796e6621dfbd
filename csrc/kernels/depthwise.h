// 3x3 depthwise convolution, one or two output rows at a time.
//
// A block of `kLanes` channels keeps its nine weights in registers and moves along the rows, kColumns outputs at a
// time: every loaded column serves all of them (two rows of stride 1: 16 loads for 36 multiply-adds, not 36).
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kColumns = 2; // rows in L1, GMAC/s on AVX-512: 85 with 2, 83 with 3, 78 with 4, 76 with 6

template <class Y> struct DepthwiseRows {
    const float *const *rows;
    std::ptrdiff_t ld;
    std::ptrdiff_t channel; // the block's first
    Y *y;
    std::ptrdiff_t y_ld;
    std::ptrdiff_t y_row;
    int left; // channels of this block that exist, kLanes or fewer
    bool relu6;
};

// R output rows, from the input rows begin..end-1 of (R - 1) * S + 3: those inside the image. Whole: all kLanes
// channels of the block exist. All are template arguments and the rows are members, so that the loop tests nothing and
// reads no pointer from memory: 53 to 64 GMAC/s, and 78 with columns that are loaded once (load_once).
template <int R, int begin, int end, int S, bool Whole, class Y> class DepthwiseBlock {
  public:
    DepthwiseBlock(const DepthwiseRows<Y> &a, const float *weight)
        : ld_(a.ld), y_(a.y), y_ld_(a.y_ld), y_row_(a.y_row), left_(a.left), relu6_(a.relu6) {
#pragma GCC unroll 5
        for (int i = begin; i < end; ++i)
            rows_[i] = a.rows[i] + a.channel;
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i)
            w_[i] = load(weight + i * kLanes);
        bias_ = load(weight + 9 * kLanes);
    }

    // N outputs of each row from output column `o` on; columns kw0..kw1-1 of the windows are inside the image (N = 1
    // unless 0..2).
    template <int N, int kw0, int kw1> inline __attribute__((always_inline)) void outputs(std::ptrdiff_t o) const {
        Vec acc[R][N];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c)
                acc[r][c] = bias_;
#pragma GCC unroll 5
        for (int row = begin; row < end; ++row) {
            const float *x = rows_[row] + (o * S - 1 + kw0) * ld_;
#pragma GCC unroll 16
            for (int i = kw0; i < (N - 1) * S + kw1; ++i, x += ld_) {
                const Vec column = Whole ? load_once(x) : load_first(x, left_);
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < N; ++c) {
                        const int kh = row - r * S, kw = i - c * S;
                        if (kh >= 0 && kh < 3 && kw >= 0 && kw < 3)
                            acc[r][c] = fma(column, w_[3 * kh + kw], acc[r][c]);
                    }
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            Y *y = y_ + r * y_row_ + o * y_ld_;
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c, y += y_ld_) {
                const Vec sum = relu6_ ? relu6(acc[r][c]) : acc[r][c];
                if (Whole)
                    store(y, sum);
                else
                    store_first(y, sum, left_);
            }
        }
    }

    void run(int width) const {
        if (width == 1) {
            outputs<1, 1, 2>(0);
            return;
        }
        const std::ptrdiff_t last = (width - 1) / S + 1;
        const std::ptrdiff_t inside = (width - 2 + S) / S; // outputs before this one have a right column
        outputs<1, 1, 3>(0);
        std::ptrdiff_t o = 1;
        for (; o + kColumns <= inside; o += kColumns)
            outputs<kColumns, 0, 3>(o);
        for (; o < inside; ++o)
            outputs<1, 0, 3>(o);
        if (o < last)
            outputs<1, 0, 2>(o);
    }

  private:
    const float *rows_[(R - 1) * S + 3];
    std::ptrdiff_t ld_;
    Y *y_;
    std::ptrdiff_t y_ld_, y_row_;
    int left_;
    bool relu6_;
    Vec w_[9];
    Vec bias_;
};

template <int R, int S, bool Whole, class Y>
void depthwise_rows(const DepthwiseRows<Y> &a, const float *weight, int width) {
    constexpr int kRows = (R - 1) * S + 3;
    if (a.rows[0] && a.rows[kRows - 1])
        DepthwiseBlock<R, 0, kRows, S, Whole, Y>(a, weight).run(width);
    else if (a.rows[kRows - 1])
        DepthwiseBlock<R, 1, kRows, S, Whole, Y>(a, weight).run(width);
    else if (a.rows[0])
        DepthwiseBlock<R, 0, kRows - 1, S, Whole, Y>(a, weight).run(width);
    else
        DepthwiseBlock<R, 1, kRows - 1, S, Whole, Y>(a, weight).run(width);
}

template <int R, int S, class Y> void depthwise_rows(const DepthwiseRows<Y> &a, const float *weight, int width) {
    if (a.left >= kLanes)
        depthwise_rows<R, S, true>(a, weight, width);
    else
        depthwise_rows<R, S, false>(a, weight, width);
}

template <int S, class Y> void depthwise_stride(const Depthwise<Y> &a) {
    constexpr int kRows = S == 1 ? kDepthwiseRows : 1; // two of stride 2 share one row of five: 4% slower than one
    for (int c = 0; c < a.channels; c += kLanes) {
        const float *const weight = a.weight + static_cast<std::ptrdiff_t>(c) * kDepthwiseBlock;
        for (int o = 0; o < a.outputs; o += kRows) {
            const DepthwiseRows<Y> rows{a.rows + o * S, a.x_ld,         c,      a.y + o * a.y_row + c, a.y_ld,
                                        a.y_row,        a.channels - c, a.relu6};
            if (a.outputs - o >= kRows)
                depthwise_rows<kRows, S>(rows, weight, a.width);
            else
                depthwise_rows<1, S>(rows, weight, a.width);
        }
    }
}

template <class Y> void depthwise_to(const Depthwise<Y> &a) {
    if (a.stride == 1)
        depthwise_stride<1>(a);
    else
        depthwise_stride<2>(a);
}

void depthwise(const DepthwiseArgs &a) { depthwise_to(a); }
void depthwise_bf16(const DepthwiseBf16Args &a) { depthwise_to(a); }

} // namespace
} // namespace mnv2::MNV2_ISA
