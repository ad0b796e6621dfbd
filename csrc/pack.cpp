#include "pack.h"

namespace mnv2 {

namespace {

constexpr int even(int count) { return count + count % 2; }

bf16 upper_half(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return {static_cast<std::uint16_t>(bits >> 16)};
}

} // namespace

std::size_t packed_gemm_size(const KernelTable &table, int cout, int depth, bool pairs) {
    const std::size_t channels = round_up(cout, table.panel);
    const std::size_t channel = pairs ? sizeof(bf16) * even(depth) : sizeof(float) * static_cast<std::size_t>(depth);
    return whole_lines(channels * (sizeof(float) + channel));
}

std::size_t packed_depthwise_size(const KernelTable &table, int channels) {
    return whole_lines(sizeof(float) * round_up(channels, table.lanes) * kDepthwiseBlock);
}

Packed pack_gemm(const KernelTable &table, const float *weight, const float *bias, int cout, int depth, bool pairs,
                 std::byte *memory) {
    const int padded = round_up(cout, table.panel), half = table.lanes / 2;
    // The channel at place i of the panel from `begin` on, or -1. Of one vector and a half, the half stands twice.
    const auto channel = [&](int begin, int i) {
        const bool halves = cout - begin > table.lanes && cout - begin <= table.lanes + half;
        const int c = begin + (halves && i >= table.lanes + half ? i - half : i);
        return c < cout ? c : -1;
    };
    float *const packed_bias = reinterpret_cast<float *>(memory);
    void *const packed = packed_bias + padded;
    const auto value = [&](int c, int k) {
        return c < 0 || k >= depth ? 0.0f : weight[static_cast<std::ptrdiff_t>(c) * depth + k];
    };
    float *floats = static_cast<float *>(packed);
    bf16 *halves = static_cast<bf16 *>(packed);
    for (int begin = 0; begin < cout; begin += table.panel) {
        for (int i = 0; i < table.panel; ++i) {
            const int c = channel(begin, i);
            packed_bias[begin + i] = c < 0 ? 0.0f : bias[c];
        }
        const int width = cout - begin > table.lanes ? table.panel : table.lanes;
        for (int k = 0; k < depth; k += pairs ? 2 : 1)
            for (int i = 0; i < width; ++i) {
                const int c = channel(begin, i);
                if (pairs) {
                    *halves++ = upper_half(value(c, k));
                    *halves++ = upper_half(value(c, k + 1));
                } else {
                    *floats++ = value(c, k);
                }
            }
    }
    return {packed, packed_bias, pairs ? even(depth) : depth, pairs};
}

Packed pack_depthwise(const KernelTable &table, const float *weight, const float *bias, int channels,
                      std::byte *memory) {
    float *const packed = reinterpret_cast<float *>(memory);
    float *out = packed;
    for (int begin = 0; begin < channels; begin += table.lanes)
        for (int tap = 0; tap < kDepthwiseBlock; ++tap)
            for (int i = 0; i < table.lanes; ++i) {
                const int c = begin + i;
                *out++ = c >= channels ? 0.0f : tap == 9 ? bias[c] : weight[static_cast<std::ptrdiff_t>(c) * 9 + tap];
            }
    return {packed, nullptr, kDepthwiseBlock, false};
}

} // namespace mnv2
