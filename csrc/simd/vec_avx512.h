// AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats.
#pragma once

#include <immintrin.h>

namespace mnv2::MNV2_ISA {
namespace {

struct Vec {
    __m512 v;
};

constexpr int kLanes = 16;
// 14 x 2 accumulators + 2 weights + 1 broadcast = 31 registers; 14 divides 112, 56, 28, 14 and 196 pixels.
constexpr int kTileRows = 14;
constexpr int kTileVecs = 2;

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(const float *p) { return {_mm512_set1_ps(*p)}; }
inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_first(const float *p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_first(float *p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
// Loads into a register for good: the compiler would rather read memory again for each use.
inline Vec load_once(const float *p) {
    Vec a = load(p);
    __asm__("" : "+v"(a.v));
    return a;
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Two half vectors in one: the lower half of `low` and the upper half of `high`, and their way from and to memory.
inline Vec join(Vec low, Vec high) { return {_mm512_mask_mov_ps(low.v, 0xff00, high.v)}; }
inline Vec upper(Vec a) {
    return {_mm512_castpd_ps(_mm512_shuffle_f64x2(_mm512_castps_pd(a.v), _mm512_castps_pd(a.v), 0x4e))};
} // in the lower half
inline Vec load_halves(const float *low, const float *high) {
    const __m512d a = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(low)));
    return {_mm512_castpd_ps(_mm512_insertf64x4(a, _mm256_castps_pd(_mm256_loadu_ps(high)), 1))};
}
inline void store_halves(float *low, float *high, Vec a) {
    _mm256_storeu_ps(low, _mm512_castps512_ps256(a.v));
    _mm256_storeu_pd(reinterpret_cast<double *>(high), _mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
}

// min(max(a, 0), 6). The instructions return their second operand when either is NaN, so a NaN stays.
inline Vec relu6(Vec a) { return {_mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(_mm512_setzero_ps(), a.v))}; }

} // namespace
} // namespace mnv2::MNV2_ISA

#include "vec_avx512_int8.h"
