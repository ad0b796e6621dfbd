// 3x3 depthwise convolution, one output row at a time.
//
// A block of `kLanes` channels keeps its nine weights in registers and moves along the row, kColumns outputs at a time:
// every loaded column serves up to both of them (stride 1: 12 loads for 18 multiply-adds, not 18).
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kColumns = 2; // rows in L1, GMAC/s on AVX-512: 85 with 2, 83 with 3, 78 with 4, 76 with 6

template <class Y> struct DepthwiseRow {
    const float *rows[3];
    std::ptrdiff_t ld;
    Y *y;
    std::ptrdiff_t y_ld;
    int left; // channels of this block that exist, kLanes or fewer
    bool relu6;
};

// Rows kh0..kh1-1 of the window are inside the image. Whole: all kLanes channels of the block exist. Both are template
// arguments and the row is a member, so that the loop tests nothing and reads no pointer from memory: 53 to 64 GMAC/s,
// and 78 with columns that are loaded once (load_once).
template <int kh0, int kh1, int S, bool Whole, class Y> class DepthwiseBlock {
  public:
    DepthwiseBlock(const DepthwiseRow<Y> &row, const float *weight) : row_(row) {
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i)
            w_[i] = load(weight + i * kLanes);
        bias_ = load(weight + 9 * kLanes);
    }

    // N outputs from output column `o` on; columns kw0..kw1-1 of the windows are inside the image (N = 1 unless 0..2).
    template <int N, int kw0, int kw1> inline __attribute__((always_inline)) void outputs(std::ptrdiff_t o) const {
        Vec acc[N];
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c)
            acc[c] = bias_;
#pragma GCC unroll 3
        for (int kh = kh0; kh < kh1; ++kh) {
            const float *x = row_.rows[kh] + (o * S - 1 + kw0) * row_.ld;
#pragma GCC unroll 16
            for (int i = kw0; i < (N - 1) * S + kw1; ++i, x += row_.ld) {
                const Vec column = Whole ? load_once(x) : load_first(x, row_.left);
#pragma GCC unroll 8
                for (int c = 0; c < N; ++c) {
                    const int kw = i - c * S;
                    if (kw >= 0 && kw < 3)
                        acc[c] = fma(column, w_[3 * kh + kw], acc[c]);
                }
            }
        }
        Y *y = row_.y + o * row_.y_ld;
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c, y += row_.y_ld) {
            const Vec r = row_.relu6 ? relu6(acc[c]) : acc[c];
            if (Whole)
                store(y, r);
            else
                store_first(y, r, row_.left);
        }
    }

    void run(int width) const {
        if (width == 1) {
            outputs<1, 1, 2>(0);
            return;
        }
        const std::ptrdiff_t end = (width - 1) / S + 1;
        const std::ptrdiff_t inside = (width - 2 + S) / S; // outputs before this one have a right column
        outputs<1, 1, 3>(0);
        std::ptrdiff_t o = 1;
        for (; o + kColumns <= inside; o += kColumns)
            outputs<kColumns, 0, 3>(o);
        for (; o < inside; ++o)
            outputs<1, 0, 3>(o);
        if (o < end)
            outputs<1, 0, 2>(o);
    }

  private:
    const DepthwiseRow<Y> row_;
    Vec w_[9];
    Vec bias_;
};

template <int kh0, int kh1, int S, bool Whole, class Y>
void depthwise_block(const DepthwiseRow<Y> &row, const float *weight, int width) {
    DepthwiseBlock<kh0, kh1, S, Whole, Y>(row, weight).run(width);
}

template <int S, bool Whole, class Y> void depthwise_rows(const DepthwiseRow<Y> &row, const float *weight, int width) {
    if (row.rows[0] && row.rows[2])
        depthwise_block<0, 3, S, Whole>(row, weight, width);
    else if (row.rows[2])
        depthwise_block<1, 3, S, Whole>(row, weight, width);
    else if (row.rows[0])
        depthwise_block<0, 2, S, Whole>(row, weight, width);
    else
        depthwise_block<1, 2, S, Whole>(row, weight, width);
}

template <int S, class Y> void depthwise_rows(const DepthwiseRow<Y> &row, const float *weight, int width) {
    if (row.left >= kLanes)
        depthwise_rows<S, true>(row, weight, width);
    else
        depthwise_rows<S, false>(row, weight, width);
}

template <class Y> void depthwise_to(const Depthwise<Y> &a) {
    for (int block = a.block_begin; block < a.block_end; ++block) {
        const std::ptrdiff_t c = static_cast<std::ptrdiff_t>(block) * kLanes;
        DepthwiseRow<Y> row{{}, a.x_ld, a.y + c, a.y_ld, static_cast<int>(a.channels - c), a.relu6};
        for (int kh = 0; kh < 3; ++kh)
            row.rows[kh] = a.rows[kh] ? a.rows[kh] + c : nullptr;
        const float *weight = a.weight + c * kDepthwiseBlock;
        if (a.stride == 1)
            depthwise_rows<1>(row, weight, a.width);
        else
            depthwise_rows<2>(row, weight, a.width);
    }
}

void depthwise(const DepthwiseArgs &a) { depthwise_to(a); }
void depthwise_bf16(const DepthwiseBf16Args &a) { depthwise_to(a); }

} // namespace
} // namespace mnv2::MNV2_ISA
