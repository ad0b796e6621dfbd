// AVX2 + FMA: 16 registers of 8 floats.
#pragma once

#include <immintrin.h>

namespace mnv2::MNV2_ISA {
namespace {

struct Vec {
    __m256 v;
};

constexpr int kLanes = 8;
// 6 x 2 accumulators + 2 weights + 1 broadcast = 15 registers.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;

inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(const float *p) { return {_mm256_broadcast_ss(p)}; }
inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_first(const float *p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_first(float *p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
// Loads into a register for good: the compiler would rather read memory again for each use.
inline Vec load_once(const float *p) {
    Vec a = load(p);
    __asm__("" : "+x"(a.v));
    return a;
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// Two half vectors in one: the lower half of `low` and the upper half of `high`, and their way from and to memory.
inline Vec join(Vec low, Vec high) { return {_mm256_blend_ps(low.v, high.v, 0xf0)}; }
inline Vec upper(Vec a) { return {_mm256_permute2f128_ps(a.v, a.v, 1)}; } // in the lower half
inline Vec load_halves(const float *low, const float *high) { return {_mm256_loadu2_m128(high, low)}; }
inline void store_halves(float *low, float *high, Vec a) { _mm256_storeu2_m128(high, low, a.v); }

// min(max(a, 0), 6). The instructions return their second operand when either is NaN, so a NaN stays.
inline Vec relu6(Vec a) { return {_mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(_mm256_setzero_ps(), a.v))}; }

} // namespace
} // namespace mnv2::MNV2_ISA

#include "vec_avx2_int8.h"
