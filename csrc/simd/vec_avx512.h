// AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats.
#pragma once

#include <immintrin.h>

#include "simd/keep.h"
#include "types.h"

namespace mnv2::MNV2_ISA {
namespace {

struct Vec {
    __m512 v;
};

constexpr int kLanes = 16;
// 14 x 2 accumulators + 2 weights + 1 broadcast = 31 registers; 14 divides 112, 56, 28, 14 and 196 pixels.
constexpr int kTileRows = 14;
constexpr int kTileVecs = 2;
// Output rows of a depthwise layer at a time. Nine weights, four sums and a bias fit beside the columns: 6 to 14% over
// one row.
constexpr int kDepthwiseRows = 2;

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(const float *p) { return {_mm512_set1_ps(*p)}; }
inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_first(const float *p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
// Past the caches, to a vector's boundary; others see them after drain().
inline void stream(float *p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void drain() { _mm_sfence(); }
inline void store_first(float *p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
// Loads into a register for good: the compiler would rather read memory again for each use.
inline Vec load_once(const float *p) {
    Vec a = load(p);
    __asm__("" : "+v"(a.v));
    return a;
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Two inputs side by side in memory, one in all even lanes and one in all odd; or the even lanes of
// one vector and the odd ones of another.
inline Vec broadcast_pair(const float *p) {
    double pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_castpd_ps(_mm512_set1_pd(pair))};
}
inline Vec alternate(Vec even, Vec odd) { return {_mm512_mask_mov_ps(even.v, 0xaaaa, odd.v)}; }
// The sum of each even lane and the odd one after it: those of `low` in the lower half, of `high` in the upper.
inline Vec sum_pairs(Vec low, Vec high) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_add_ps(_mm512_permutex2var_ps(low.v, even, high.v), _mm512_permutex2var_ps(low.v, odd, high.v))};
}

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

// bfloat16: widened by the loads, rounded to the nearest, ties to even, by the stores; a NaN stays one.
inline Vec widened(__m256i a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16))}; }

// Pairs: each lane holds two bf16, the first in its lower half.
inline Vec load_pairs(const bf16 *p) { return {_mm512_loadu_ps(p)}; }
inline Vec broadcast_pair(const bf16 *p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}
inline Vec broadcast_single(const bf16 *p) { return {_mm512_castsi512_ps(_mm512_set1_epi32(p->bits))}; }
inline Vec firsts(Vec pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs.v), 16))}; }
inline Vec seconds(Vec pairs) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v), upper))};
}

#ifdef __AVX512BF16__
constexpr bool kDot2 = true;

inline __m256i rounded(Vec a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)); }
// acc + the dot product of a lane's pairs.
inline Vec dot2(Vec acc, Vec a, Vec b) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#else
constexpr bool kDot2 = false;

inline __m256i rounded(Vec a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
// acc + the dot product of a lane's pairs, its second product first as the instruction has it.
inline Vec dot2(Vec acc, Vec a, Vec b) { return fma(firsts(a), firsts(b), fma(seconds(a), seconds(b), acc)); }
#endif

// The pairs of a lane each of a and b.
inline void store_pairs(bf16 *p, Vec a, Vec b) {
    const __m512i low = _mm512_cvtepu16_epi32(rounded(a)), high = _mm512_cvtepu16_epi32(rounded(b));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

inline Vec load(const bf16 *p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline Vec load_first(const bf16 *p, int n) { return widened(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store(bf16 *p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), rounded(a)); }
inline void store_first(bf16 *p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), rounded(a)); }
inline Vec load_halves(const bf16 *low, const bf16 *high) {
    return widened(
        _mm256_loadu2_m128i(reinterpret_cast<const __m128i *>(high), reinterpret_cast<const __m128i *>(low)));
}
inline void store_halves(bf16 *low, bf16 *high, Vec a) {
    _mm256_storeu2_m128i(reinterpret_cast<__m128i *>(high), reinterpret_cast<__m128i *>(low), rounded(a));
}

// min(max(a, 0), 6). The instructions return their second operand when either is NaN, so a NaN stays.
inline Vec relu6(Vec a) { return {_mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(_mm512_setzero_ps(), a.v))}; }
// Its gradient at a: g, or 0 where a <= 0 or a >= 6.
inline Vec relu6_gradient(Vec a, Vec g) {
    const __mmask16 inside = _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NLE_UQ) &
                             _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(6.0f), _CMP_NGE_UQ);
    return {_mm512_maskz_mov_ps(inside, g.v)};
}

} // namespace
} // namespace mnv2::MNV2_ISA

#include "vec_avx512_int8.h"
