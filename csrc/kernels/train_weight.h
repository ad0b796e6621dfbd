// The weights' gradient of a 1x1 convolution: a matrix product over pixels, on the register tile of gemm_tile.h. Its
// rows are output channels, read down a column of dz; its vectors are input channels, in panels.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// Output channels of a tile. Widths are multiples of 8, and eight rows of two vectors already hide the latency of the
// multiply-adds; 14 rows leave remainders that do not. Of one vector twice as many, a whole cache line of dz.
constexpr int kWeightRows = kTileRows >= 8 ? 8 : kTileRows >= 4 ? 4 : 2;

struct PixelColumns {
    const float *x;
    std::ptrdiff_t ld;

    template <int R> class Walk {
      public:
        explicit Walk(const PixelColumns &columns) : x_(columns.x), ld_(columns.ld) {}
        const float *at(int r) const { return x_ + r; }
        void next() { x_ += ld_; }

      private:
        const float *x_;
        std::ptrdiff_t ld_;
    };
};

// The tiles of output channels [from, cout), as many rows at a time as fit, then half as many.
template <int R, int V> inline void weight_tiles(const WeightGradientArgs &a, const float *panel, int n, int from) {
    int o = from;
    for (; o + R <= a.cout; o += R) {
        const Epilogue e{nullptr, 0, a.dw + o * a.dw_ld + n, a.dw_ld, a.cin - n, false, a.accumulate};
        gemm_tile<R, V>(PixelColumns{a.dz + o, a.dz_ld}, panel, nullptr, static_cast<int>(a.pixels), panel, e);
    }
    if constexpr (R > 1)
        weight_tiles<R / 2, V>(a, panel, n, o);
}

void train_weight_gradient(const WeightGradientArgs &a) {
    for (int n = 0; n < a.cin; n += kPanel) {
        const float *const panel = a.a + n * a.capacity;
        if (a.cin - n > kLanes)
            weight_tiles<kWeightRows, 2>(a, panel, n, 0);
        else
            weight_tiles<2 * kWeightRows, 1>(a, panel, n, 0);
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
