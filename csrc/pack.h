// Weights in the order the kernels read them, and memory on cache lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "types.h"

namespace mnv2 {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct FreeDeleter {
    void operator()(std::byte *p) const { std::free(p); }
};
using Memory = std::unique_ptr<std::byte[], FreeDeleter>;

constexpr std::size_t whole_lines(std::size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// `bytes` on a cache line, not initialised. Throws std::bad_alloc.
inline Memory allocate(std::size_t bytes) {
    if (bytes > SIZE_MAX / 2)
        throw std::bad_alloc();
    void *p = std::aligned_alloc(kCacheLine, bytes ? whole_lines(bytes) : kCacheLine);
    if (!p)
        throw std::bad_alloc();
    return Memory(static_cast<std::byte *>(p));
}

inline float to_float(float a) { return a; }
inline float to_float(bf16 a) {
    const std::uint32_t bits = static_cast<std::uint32_t>(a.bits) << 16;
    float to;
    std::memcpy(&to, &bits, sizeof to);
    return to;
}

struct Packed {
    const void *weight; // float, or bf16 where `pairs`
    const float *bias;  // padded with zeros to whole panels; null for depthwise, whose blocks hold it
    int depth;          // weights of a channel in the panels
    bool pairs;
};

// Bytes of a packed layer, weights and bias, a multiple of a cache line.
std::size_t packed_gemm_size(const KernelTable &table, int cout, int depth, bool pairs);
std::size_t packed_depthwise_size(const KernelTable &table, int channels);

// Floats of an input in all panels of `cout` channels.
int packed_columns(const KernelTable &table, int cout);

// A matrix of weights where it lies: that of output channel c and input k is weight[c * channel + k * input].
template <class W> struct MatrixOf {
    const W *weight;
    std::ptrdiff_t channel;
    std::ptrdiff_t input;
};
using Matrix = MatrixOf<float>;

// Inputs [begin, end) of the panels of channels [from, to) of `cout`, as pack_gemm lays them out; returns the end of
// what it wrote. `from` and `to` are whole panels or the end. Of one vector and a half, the half holds two inputs in
// alternate lanes, in the rows of the even ones.
float *pack_panels(const KernelTable &table, const Matrix &m, int cout, int begin, int end, int from, int to,
                   float *out);

// A bias as pack_gemm pads it to the panels.
void pack_bias(const KernelTable &table, const float *bias, int cout, float *out);

// All inputs of the panels of channels [from, to), in pairs as pack_gemm lays them out.
bf16 *pack_pairs(const KernelTable &table, const MatrixOf<bf16> &m, int cout, int depth, int from, int to, bf16 *out);

// weight [cout, depth] row-major -> panels [cout / panel][depth][panel]. The last panel is one vector wide where one is
// enough; where one and a half are, its half holds two inputs at once, [depth / 2][lanes / 2][2], every second row of
// it empty. Missing channels are zero. Writes packed_gemm_size bytes at `out`.
// `pairs`: as bf16, two inputs of a channel together, [cout / panel][depth / 2][panel][2], with a zero after an odd
// depth's last; a weight that is no bf16 loses its lower half. Of one vector and a half, the half stands twice.
Packed pack_gemm(const KernelTable &table, const float *weight, const float *bias, int cout, int depth, bool pairs,
                 std::byte *out);

// The same for kPiece inputs at a time: [depth / kPiece] of [cout / panel][kPiece][panel].
Packed pack_linear(const KernelTable &table, const float *weight, const float *bias, int cout, int depth,
                   std::byte *out);

// weight [channels, 9] -> blocks [channels / lanes][9 taps + bias][lanes]. Writes packed_depthwise_size bytes at
// `out`.
Packed pack_depthwise(const KernelTable &table, const float *weight, const float *bias, int channels, std::byte *out);

} // namespace mnv2
