// 1x1 convolution: a matrix product of pixels and packed weights, with bias, ReLU6 and residual in its epilogue.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

struct PixelRows {
    const float *x;
    std::ptrdiff_t ld;
    const float *at(int r, int k) const { return x + r * ld + k; }
};

void pointwise(const PointwiseArgs &a) {
    // Panels outside, pixels inside: a panel of weights comes from memory once, the pixels are in L1 or L2.
    for (int panel = a.panel_begin; panel < a.panel_end; ++panel) {
        const int n = panel * kPanel;
        const float *w = a.weight + static_cast<std::ptrdiff_t>(n) * a.cin;
        Epilogue e{a.residual ? a.residual + n : nullptr, a.residual_ld, a.y + n, a.y_ld, a.cout - n, a.relu6};
        for (std::ptrdiff_t p = 0; p < a.pixels; p += kTileRows) {
            const int rows = min(a.pixels - p, kTileRows);
            gemm_tile(rows, PixelRows{a.x + p * a.x_ld, a.x_ld}, w, a.bias + n, a.cin, e);
            e.y += rows * a.y_ld;
            if (e.residual)
                e.residual += rows * a.residual_ld;
        }
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
