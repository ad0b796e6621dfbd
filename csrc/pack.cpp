#include "pack.h"

namespace mnv2 {

Packed pack_gemm(const KernelTable &table, const float *weight, const float *bias, int cout, int depth) {
    const int padded = round_up(cout, table.panel);
    Packed packed{allocate(static_cast<std::size_t>(padded) * depth), allocate(padded)};
    for (int n = 0; n < padded; ++n)
        packed.bias[n] = n < cout ? bias[n] : 0.0f;
    for (int begin = 0; begin < cout; begin += table.panel) {
        const int width = cout - begin > table.lanes ? table.panel : table.lanes;
        float *out = packed.weight.get() + static_cast<std::ptrdiff_t>(begin) * depth;
        for (int k = 0; k < depth; ++k)
            for (int i = 0; i < width; ++i)
                *out++ = begin + i < cout ? weight[static_cast<std::ptrdiff_t>(begin + i) * depth + k] : 0.0f;
    }
    return packed;
}

Packed pack_depthwise(const KernelTable &table, const float *weight, const float *bias, int channels) {
    const int padded = round_up(channels, table.lanes);
    Packed packed{allocate(static_cast<std::size_t>(padded) * kDepthwiseBlock), nullptr};
    float *out = packed.weight.get();
    for (int begin = 0; begin < channels; begin += table.lanes)
        for (int tap = 0; tap < kDepthwiseBlock; ++tap)
            for (int i = 0; i < table.lanes; ++i) {
                const int c = begin + i;
                *out++ = c >= channels ? 0.0f : tap == 9 ? bias[c] : weight[c * 9 + tap];
            }
    return packed;
}

} // namespace mnv2
