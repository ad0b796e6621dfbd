// Weights in the order the kernels read them, and memory on cache lines.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "types.h"

namespace mnv2 {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct FreeDeleter {
    void operator()(float *p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], FreeDeleter>;

// `count` floats on a cache line, not initialised. Throws std::bad_alloc.
inline Floats allocate(std::size_t count) {
    if (count > SIZE_MAX / (2 * sizeof(float)))
        throw std::bad_alloc();
    const std::size_t bytes = (count * sizeof(float) + kCacheLine - 1) / kCacheLine * kCacheLine;
    void *p = std::aligned_alloc(kCacheLine, bytes ? bytes : kCacheLine);
    if (!p)
        throw std::bad_alloc();
    return Floats(static_cast<float *>(p));
}

struct Packed {
    const float *weight;
    const float *bias; // padded with zeros to whole panels; null for depthwise, whose blocks hold it
};

// Floats of a packed layer, weights and bias, a multiple of a cache line.
std::size_t packed_gemm_size(const KernelTable &table, int cout, int depth);
std::size_t packed_depthwise_size(const KernelTable &table, int channels);

// weight [cout, depth] row-major -> panels [cout / panel][depth][panel]. The last panel is one vector wide where one is
// enough; where one and a half are, its half stands twice, for two pixels at once. Missing channels are zero. Writes
// packed_gemm_size floats at `out`.
Packed pack_gemm(const KernelTable &table, const float *weight, const float *bias, int cout, int depth, float *out);

// weight [channels, 9] -> blocks [channels / lanes][9 taps + bias][lanes]. Writes packed_depthwise_size floats at
// `out`.
Packed pack_depthwise(const KernelTable &table, const float *weight, const float *bias, int channels, float *out);

} // namespace mnv2
