// Portable C++: four floats in an array, for a processor none of the other rows fits and as their twin in tests.
#pragma once

#include "simd/keep.h"
#include "types.h"

namespace mnv2::MNV2_ISA {
namespace {

struct Vec {
    float v[4];
};

constexpr int kLanes = 4;
constexpr int kTileRows = 3;
constexpr int kTileVecs = 2;
constexpr bool kDot2 = true; // no float32 form is faster than bf16's own
// Output rows of a depthwise layer at a time.
constexpr int kDepthwiseRows = 1;

template <class F> inline Vec each(F f) {
    Vec r;
    for (int i = 0; i < kLanes; ++i)
        r.v[i] = f(i);
    return r;
}

inline Vec zero() { return Vec{}; }
inline Vec broadcast(const float *p) {
    return each([p](int) { return *p; });
}
inline Vec load(const float *p) {
    return each([p](int i) { return p[i]; });
}
inline Vec load_first(const float *p, int n) {
    return each([p, n](int i) { return i < n ? p[i] : 0.0f; });
}
inline Vec load_once(const float *p) { return load(p); }
inline void store(float *p, Vec a) {
    for (int i = 0; i < kLanes; ++i)
        p[i] = a.v[i];
}
// Past the caches, where there is a way; others see them after drain().
inline void stream(float *p, Vec a) { store(p, a); }
inline void drain() {}
inline void store_first(float *p, Vec a, int n) {
    for (int i = 0; i < n; ++i)
        p[i] = a.v[i];
}
inline Vec add(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}

// Two inputs side by side in memory, one in all even lanes and one in all odd; or the even lanes of one vector and the
// odd ones of another.
inline Vec broadcast_pair(const float *p) {
    return each([p](int i) { return p[i % 2]; });
}
inline Vec alternate(Vec even, Vec odd) {
    return each([&](int i) { return i % 2 ? odd.v[i] : even.v[i]; });
}
// The sum of each even lane and the odd one after it: those of `low` in the lower half, of `high` in the upper.
inline Vec sum_pairs(Vec low, Vec high) {
    return each([&](int i) {
        const Vec &from = i < kLanes / 2 ? low : high;
        const int lane = 2 * (i % (kLanes / 2));
        return from.v[lane] + from.v[lane + 1];
    });
}

// Two half vectors in one: the lower half of `low` and the upper half of `high`, and their way from and to memory.
inline Vec join(Vec low, Vec high) {
    return each([&](int i) { return i < kLanes / 2 ? low.v[i] : high.v[i]; });
}
inline Vec upper(Vec a) { // in the lower half
    return each([&](int i) { return a.v[(i + kLanes / 2) % kLanes]; });
}
inline Vec load_halves(const float *low, const float *high) {
    return each([&](int i) { return i < kLanes / 2 ? low[i] : high[i - kLanes / 2]; });
}
inline void store_halves(float *low, float *high, Vec a) {
    for (int i = 0; i < kLanes / 2; ++i) {
        low[i] = a.v[i];
        high[i] = a.v[kLanes / 2 + i];
    }
}

// bfloat16: widened by the loads, rounded to the nearest, ties to even, by the stores; a NaN stays one.
inline float float_of(std::uint32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, sizeof f);
    return f;
}
inline std::uint32_t bits_of(float f) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return bits;
}
inline float widened(bf16 a) { return float_of(static_cast<std::uint32_t>(a.bits) << 16); }
inline bf16 rounded(float f) {
    const std::uint32_t bits = bits_of(f);
    if (f != f)
        return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Vec load(const bf16 *p) {
    return each([p](int i) { return widened(p[i]); });
}
inline Vec load_first(const bf16 *p, int n) {
    return each([p, n](int i) { return i < n ? widened(p[i]) : 0.0f; });
}
inline void store(bf16 *p, Vec a) {
    for (int i = 0; i < kLanes; ++i)
        p[i] = rounded(a.v[i]);
}
inline void store_first(bf16 *p, Vec a, int n) {
    for (int i = 0; i < n; ++i)
        p[i] = rounded(a.v[i]);
}

// Pairs: each lane holds two bf16, the first in its lower half.
inline Vec load_pairs(const bf16 *p) {
    return each([p](int i) { return float_of(p[2 * i].bits | static_cast<std::uint32_t>(p[2 * i + 1].bits) << 16); });
}
inline Vec broadcast_pair(const bf16 *p) {
    return each([p](int) { return float_of(p[0].bits | static_cast<std::uint32_t>(p[1].bits) << 16); });
}
inline Vec broadcast_single(const bf16 *p) {
    return each([p](int) { return float_of(p[0].bits); });
}
inline Vec firsts(Vec pairs) {
    return each([&](int i) { return float_of(bits_of(pairs.v[i]) << 16); });
}
inline Vec seconds(Vec pairs) {
    return each([&](int i) { return float_of(bits_of(pairs.v[i]) & 0xffff0000u); });
}
// The pairs of a lane each of a and b.
inline void store_pairs(bf16 *p, Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) {
        p[2 * i] = rounded(a.v[i]);
        p[2 * i + 1] = rounded(b.v[i]);
    }
}
// acc + the dot product of a lane's pairs, its second product first as the instruction has it.
inline Vec dot2(Vec acc, Vec a, Vec b) { return fma(firsts(a), firsts(b), fma(seconds(a), seconds(b), acc)); }

// Both comparisons are false for a NaN, which stays.
inline Vec relu6(Vec a) {
    return each([&](int i) { return a.v[i] < 0.0f ? 0.0f : a.v[i] > 6.0f ? 6.0f : a.v[i]; });
}
// Its gradient at a: g, or 0 where a <= 0 or a >= 6.
inline Vec relu6_gradient(Vec a, Vec g) {
    return each([&](int i) { return a.v[i] <= 0.0f || a.v[i] >= 6.0f ? 0.0f : g.v[i]; });
}
inline void store_halves(bf16 *low, bf16 *high, Vec a) {
    store_first(low, a, kLanes / 2);
    store_first(high, upper(a), kLanes / 2);
}
inline Vec load_halves(const bf16 *low, const bf16 *high) {
    return each([&](int i) { return widened(i < kLanes / 2 ? low[i] : high[i - kLanes / 2]); });
}

} // namespace
} // namespace mnv2::MNV2_ISA

#include "vec_scalar_int8.h"
