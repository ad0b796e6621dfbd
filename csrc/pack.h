// Weights in the order the kernels read them, and memory on cache lines.
#pragma once

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
    const std::size_t bytes = (count * sizeof(float) + kCacheLine - 1) / kCacheLine * kCacheLine;
    void *p = std::aligned_alloc(kCacheLine, bytes ? bytes : kCacheLine);
    if (!p)
        throw std::bad_alloc();
    return Floats(static_cast<float *>(p));
}

struct Packed {
    Floats weight;
    Floats bias; // padded with zeros to whole panels; empty for depthwise, whose blocks hold it
};

// weight [cout, depth] row-major -> panels [cout / panel][depth][panel], the last panel one vector wide where one is
// enough; missing channels are zero.
Packed pack_gemm(const KernelTable &table, const float *weight, const float *bias, int cout, int depth);

// weight [channels, 9] -> blocks [channels / lanes][9 taps + bias][lanes].
Packed pack_depthwise(const KernelTable &table, const float *weight, const float *bias, int channels);

} // namespace mnv2
