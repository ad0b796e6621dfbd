// Integers for int8 on AVX2: 8 lanes of int32, each also four bytes. dot4 is two 16-bit multiply-adds, which are exact
// (vpmaddubsw would saturate).
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// 4 x 2 accumulators, two vectors of weights and one of pixels in 16-bit halves: 14 registers.
constexpr int kInt8Pixels = 4;

struct Int {
    __m256i v;
};
struct Bytes {
    __m256i v;
};

inline Int zero_int() { return {_mm256_setzero_si256()}; }
inline Int load(const std::int32_t *p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))}; }
inline void store(std::int32_t *p, Int a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }
inline Int add(Int a, Int b) { return {_mm256_add_epi32(a.v, b.v)}; }
template <int N> inline Int shift_left(Int a) { return {_mm256_slli_epi32(a.v, N)}; }
inline Vec to_float(Int a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Int to_int(Vec a) { return {_mm256_cvtps_epi32(a.v)}; } // to nearest, halves to even
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec clamp(Vec a, Vec low, Vec high) { return {_mm256_min_ps(_mm256_max_ps(a.v, low.v), high.v)}; }

inline Bytes zero_bytes() { return {_mm256_setzero_si256()}; }
inline Bytes load_bytes(const void *p) { return {_mm256_loadu_si256(static_cast<const __m256i *>(p))}; }
inline void store(std::uint8_t *p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }
// Rows N, N + 1, .. of eight: four of `low`, then four of `high`; as the hidden layout has them.
template <int N> inline Bytes rows_from(Bytes low, Bytes high) { return {_mm256_alignr_epi8(high.v, low.v, 4 * N)}; }

// Lanes of four rows -> bytes, saturated to 0..255: for each four channels, row after row.
inline Bytes pack4(Int a, Int b, Int c, Int d) {
    return {_mm256_packus_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v))};
}
// The same of a + z, ...; `z` holds int16, for each four channels twice.
inline Bytes pack4(Int a, Int b, Int c, Int d, Bytes z) {
    const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(a.v, b.v), z.v);
    return {_mm256_packus_epi16(low, _mm256_adds_epi16(_mm256_packs_epi32(c.v, d.v), z.v))};
}
// For each four channels: channel after channel, its four rows together; or back.
inline Bytes transpose4(Bytes a) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm256_shuffle_epi8(a.v, _mm256_broadcastsi128_si256(order))};
}
// The lanes' lowest bytes, kLanes of them.
inline void store_low(std::uint8_t *p, Int a) {
    const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, //
                                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8(a.v, lowest);
    const std::int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    __builtin_memcpy(p, &low, 4);
    __builtin_memcpy(p + 4, &high, 4);
}

struct Unsigned4 {
    __m256i even, odd; // 16-bit
};
struct Signed4 {
    __m256i even, odd;
};
inline Unsigned4 as_unsigned(Bytes a) {
    return {_mm256_and_si256(a.v, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(a.v, 8)};
}
inline Signed4 as_signed(Bytes a) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(a.v, 8), 8), _mm256_srai_epi16(a.v, 8)};
}
inline Int dot4(Int acc, Unsigned4 u, Signed4 s) {
    const __m256i even = _mm256_madd_epi16(u.even, s.even), odd = _mm256_madd_epi16(u.odd, s.odd);
    return {_mm256_add_epi32(acc.v, _mm256_add_epi32(even, odd))};
}

inline Unsigned4 broadcast4(const std::uint8_t *p) {
    std::int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return as_unsigned({_mm256_set1_epi32(quad)});
}

} // namespace
} // namespace mnv2::MNV2_ISA
