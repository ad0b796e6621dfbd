// Portable C++: four floats in an array, for a processor none of the other rows fits and as their twin in tests.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

struct Vec {
    float v[4];
};

constexpr int kLanes = 4;
constexpr int kTileRows = 3;
constexpr int kTileVecs = 2;

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
inline void store_first(float *p, Vec a, int n) {
    for (int i = 0; i < n; ++i)
        p[i] = a.v[i];
}
inline Vec add(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
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

// Both comparisons are false for a NaN, which stays.
inline Vec relu6(Vec a) {
    return each([&](int i) { return a.v[i] < 0.0f ? 0.0f : a.v[i] > 6.0f ? 6.0f : a.v[i]; });
}

} // namespace
} // namespace mnv2::MNV2_ISA

#include "vec_scalar_int8.h"
