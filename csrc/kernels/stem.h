// The first layer, 3x3 stride 2 from three colours: a matrix product over 27 taps, read where they lie.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

struct Taps {
    const float *const *taps;
    std::ptrdiff_t offset;
    std::ptrdiff_t step;
    const float *at(int r, int k) const { return taps[k] + offset + r * step; }
};

void stem(const StemArgs &a) {
    for (int n = 0; n < a.cout; n += kPanel) {
        const float *w = a.weight + static_cast<std::ptrdiff_t>(n) * kStemTaps;
        for (std::ptrdiff_t p = 0; p < a.pixels; p += kTileRows) {
            const Epilogue e{nullptr, 0, a.y + p * a.y_ld + n, a.y_ld, a.cout - n, a.relu6, false};
            gemm_tile(min(a.pixels - p, kTileRows), Taps{a.taps, p * a.step, a.step}, w, a.bias + n, kStemTaps, e);
        }
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
