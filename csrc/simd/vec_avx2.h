// AVX2 + FMA: 16 registers of 8 floats.
#pragma once

#include <immintrin.h>

#include "simd/keep.h"
#include "types.h"

namespace mnv2::MNV2_ISA {
namespace {

struct Vec {
    __m256 v;
};

constexpr int kLanes = 8;
// 6 x 2 accumulators + 2 weights + 1 broadcast = 15 registers.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;
constexpr bool kDot2 = false;
// Output rows of a depthwise layer at a time: nine weights leave no registers for the sums of two.
constexpr int kDepthwiseRows = 1;

inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(const float *p) { return {_mm256_broadcast_ss(p)}; }
inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
inline Vec load_first(const float *p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.v); }
// Past the caches, to a vector's boundary; others see them after drain().
inline void stream(float *p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void drain() { _mm_sfence(); }
inline void store_first(float *p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
// Loads into a register for good: the compiler would rather read memory again for each use.
inline Vec load_once(const float *p) {
    Vec a = load(p);
    __asm__("" : "+x"(a.v));
    return a;
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// Two inputs side by side in memory, one in all even lanes and one in all odd; or the even lanes of
// one vector and the odd ones of another.
inline Vec broadcast_pair(const float *p) {
    double pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm256_castpd_ps(_mm256_set1_pd(pair))};
}
inline Vec alternate(Vec even, Vec odd) { return {_mm256_blend_ps(even.v, odd.v, 0xaa)}; }
// The sum of each even lane and the odd one after it: those of `low` in the lower half, of `high` in the upper.
inline Vec sum_pairs(Vec low, Vec high) {
    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(low.v, high.v));
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8))};
}

// Two half vectors in one: the lower half of `low` and the upper half of `high`, and their way from and to memory.
inline Vec join(Vec low, Vec high) { return {_mm256_blend_ps(low.v, high.v, 0xf0)}; }
inline Vec upper(Vec a) { return {_mm256_permute2f128_ps(a.v, a.v, 1)}; } // in the lower half
inline Vec load_halves(const float *low, const float *high) { return {_mm256_loadu2_m128(high, low)}; }
inline void store_halves(float *low, float *high, Vec a) { _mm256_storeu2_m128(high, low, a.v); }

// bfloat16: widened by the loads, rounded to the nearest, ties to even, by the stores; a NaN stays one.
inline Vec widened(__m128i a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16))}; }
inline __m128i rounded(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(near, nan, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
inline Vec load(const bf16 *p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Vec load_first(const bf16 *p, int n) {
    alignas(16) bf16 few[kLanes] = {};
    for (int i = 0; i < n; ++i)
        few[i] = p[i];
    return load(few);
}
inline void store(bf16 *p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), rounded(a)); }
inline void store_first(bf16 *p, Vec a, int n) {
    alignas(16) bf16 few[kLanes];
    store(few, a);
    for (int i = 0; i < n; ++i)
        p[i] = few[i];
}
inline Vec load_halves(const bf16 *low, const bf16 *high) {
    return widened(_mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(low)),
                                      _mm_loadl_epi64(reinterpret_cast<const __m128i *>(high))));
}
inline void store_halves(bf16 *low, bf16 *high, Vec a) {
    const __m128i r = rounded(a);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(low), r);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(high), _mm_unpackhi_epi64(r, r));
}

// Pairs: each lane holds two bf16, the first in its lower half.
inline Vec load_pairs(const bf16 *p) { return load(reinterpret_cast<const float *>(p)); }
inline Vec broadcast_pair(const bf16 *p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return {_mm256_castsi256_ps(_mm256_set1_epi32(pair))};
}
inline Vec broadcast_single(const bf16 *p) { return {_mm256_castsi256_ps(_mm256_set1_epi32(p->bits))}; }
inline Vec firsts(Vec pairs) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))}; }
inline Vec seconds(Vec pairs) {
    return {_mm256_and_ps(pairs.v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}
// The pairs of a lane each of a and b.
inline void store_pairs(bf16 *p, Vec a, Vec b) {
    const __m256i low = _mm256_cvtepu16_epi32(rounded(a)), high = _mm256_cvtepu16_epi32(rounded(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}
// acc + the dot product of a lane's pairs, its second product first as the instruction has it.
inline Vec dot2(Vec acc, Vec a, Vec b) { return fma(firsts(a), firsts(b), fma(seconds(a), seconds(b), acc)); }

// min(max(a, 0), 6). The instructions return their second operand when either is NaN, so a NaN stays.
inline Vec relu6(Vec a) { return {_mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(_mm256_setzero_ps(), a.v))}; }
// Its gradient at a: g, or 0 where a <= 0 or a >= 6.
inline Vec relu6_gradient(Vec a, Vec g) {
    const __m256 outside = _mm256_or_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_LE_OQ),
                                        _mm256_cmp_ps(a.v, _mm256_set1_ps(6.0f), _CMP_GE_OQ));
    return {_mm256_andnot_ps(outside, g.v)};
}

} // namespace
} // namespace mnv2::MNV2_ISA

#include "vec_avx2_int8.h"
