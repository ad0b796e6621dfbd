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
    const int chunks = (a.cin + kChunk - 1) / kChunk;
    // Panels outside, pixels inside: the weights of a layer may be larger than L2, its pixels are not.
    for (int panel = a.panel_begin; panel < a.panel_end; ++panel) {
        const int n = panel * kPanel, width = a.cout - n > kLanes ? kPanel : kLanes;
        const float *w = a.weight + static_cast<std::ptrdiff_t>(n) * a.cin;
        for (std::ptrdiff_t p = 0; p < a.pixels; p += kTileRows) {
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const int begin = static_cast<int>(static_cast<std::int64_t>(a.cin) * chunk / chunks);
                const int end = static_cast<int>(static_cast<std::int64_t>(a.cin) * (chunk + 1) / chunks);
                const bool last = chunk + 1 == chunks;
                const Epilogue e{last && a.residual ? a.residual + p * a.residual_ld + n : nullptr,
                                 a.residual_ld,
                                 a.y + p * a.y_ld + n,
                                 a.y_ld,
                                 a.cout - n,
                                 last && a.relu6,
                                 chunk > 0};
                gemm_tile(min(a.pixels - p, kTileRows), PixelRows{a.x + p * a.x_ld + begin, a.x_ld},
                          w + static_cast<std::ptrdiff_t>(begin) * width, a.bias + n, end - begin, e);
            }
        }
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
