// Integers for int8 on AVX-512: 16 lanes of int32, each also four bytes. dot4 is one instruction where the row's flags
// have VNNI, and two 16-bit multiply-adds elsewhere: exact both ways (vpmaddubsw would saturate).
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// Tiles of int8 products hold this many pixels of two vectors: 12 x 2 accumulators, weights and pixels.
constexpr int kInt8Pixels = 14;

struct Int {
    __m512i v;
};
struct Bytes {
    __m512i v;
};

inline Int zero_int() { return {_mm512_setzero_si512()}; }
inline Int load(const std::int32_t *p) { return {_mm512_loadu_si512(p)}; }
inline void store(std::int32_t *p, Int a) { _mm512_storeu_si512(p, a.v); }
inline Int add(Int a, Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int N> inline Int shift_left(Int a) { return {_mm512_slli_epi32(a.v, N)}; }
inline Vec to_float(Int a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Int to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; } // to nearest, halves to even
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec clamp(Vec a, Vec low, Vec high) { return {_mm512_min_ps(_mm512_max_ps(a.v, low.v), high.v)}; }

inline Bytes zero_bytes() { return {_mm512_setzero_si512()}; }
inline Bytes load_bytes(const void *p) { return {_mm512_loadu_si512(p)}; }
inline void store(std::uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a.v); }
// Rows N, N + 1, .. of eight: four of `low`, then four of `high`; as the hidden layout has them.
template <int N> inline Bytes rows_from(Bytes low, Bytes high) { return {_mm512_alignr_epi8(high.v, low.v, 4 * N)}; }

// Lanes of four rows -> bytes, saturated to 0..255: for each four channels, row after row.
inline Bytes pack4(Int a, Int b, Int c, Int d) {
    return {_mm512_packus_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v))};
}
// The same of a + z, ...; `z` holds int16, for each four channels twice.
inline Bytes pack4(Int a, Int b, Int c, Int d, Bytes z) {
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(a.v, b.v), z.v);
    return {_mm512_packus_epi16(low, _mm512_adds_epi16(_mm512_packs_epi32(c.v, d.v), z.v))};
}
// For each four channels: channel after channel, its four rows together; or back.
inline Bytes transpose4(Bytes a) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(order))};
}
// The lanes' lowest bytes, kLanes of them.
inline void store_low(std::uint8_t *p, Int a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(a.v));
}

#ifdef __AVX512VNNI__
struct Unsigned4 {
    __m512i v;
};
struct Signed4 {
    __m512i v;
};
inline Unsigned4 as_unsigned(Bytes a) { return {a.v}; }
inline Signed4 as_signed(Bytes a) { return {a.v}; }
// By name: GCC 12 copies the accumulators of its own intrinsic before and after each use (2.1 ms an image, 1.5 so).
inline Int dot4(Int acc, Unsigned4 u, Signed4 s) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
    return acc;
}
#else
struct Unsigned4 {
    __m512i even, odd; // 16-bit
};
struct Signed4 {
    __m512i even, odd;
};
inline Unsigned4 as_unsigned(Bytes a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(a.v, 8)};
}
inline Signed4 as_signed(Bytes a) {
    return {_mm512_srai_epi16(_mm512_slli_epi16(a.v, 8), 8), _mm512_srai_epi16(a.v, 8)};
}
inline Int dot4(Int acc, Unsigned4 u, Signed4 s) {
    const __m512i even = _mm512_madd_epi16(u.even, s.even), odd = _mm512_madd_epi16(u.odd, s.odd);
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
}
#endif

inline Unsigned4 broadcast4(const std::uint8_t *p) {
    std::int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return as_unsigned({_mm512_set1_epi32(quad)});
}

} // namespace
} // namespace mnv2::MNV2_ISA
