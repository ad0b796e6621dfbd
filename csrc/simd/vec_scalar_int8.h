// Integers for int8 in portable C++: four lanes of int32, each also four bytes.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kInt8Pixels = 2; // the compiler keeps no more in registers, and int8's code is half as long

struct Int {
    std::int32_t v[4];
};
struct Bytes {
    std::uint8_t v[16];
};

template <class F> inline Int each_int(F f) {
    Int r;
    for (int i = 0; i < kLanes; ++i)
        r.v[i] = f(i);
    return r;
}
template <class F> inline Bytes each_byte(F f) {
    Bytes r;
    for (int i = 0; i < 4 * kLanes; ++i)
        r.v[i] = static_cast<std::uint8_t>(f(i));
    return r;
}

inline Int zero_int() { return Int{}; }
inline Int load(const std::int32_t *p) {
    return each_int([p](int i) { return p[i]; });
}
inline void store(std::int32_t *p, Int a) { __builtin_memcpy(p, a.v, sizeof(a.v)); }
inline std::int32_t wrapping_add(std::int32_t a, std::int32_t b) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}
inline Int add(Int a, Int b) {
    return each_int([&](int i) { return wrapping_add(a.v[i], b.v[i]); });
}
template <int N> inline Int shift_left(Int a) {
    return each_int([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << N); });
}
inline Vec to_float(Int a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
}
// To nearest, halves to even: adding 1.5 * 2^23 leaves no room for a fraction. Past the 1024 either way that this holds
// to, every answer saturates; a NaN becomes -1024.
inline Int to_int(Vec a) {
    constexpr float kLimit = 1024.0f, kNoFraction = 12582912.0f;
    return each_int([&](int i) {
        const float x = a.v[i] > -kLimit ? a.v[i] : -kLimit;
        const float rounded = (x < kLimit ? x : kLimit) + kNoFraction;
        return static_cast<std::int32_t>(rounded - kNoFraction);
    });
}
inline Vec mul(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec clamp(Vec a, Vec low, Vec high) {
    return each([&](int i) {
        const float x = a.v[i] > low.v[i] ? a.v[i] : low.v[i];
        return x < high.v[i] ? x : high.v[i];
    });
}

inline Bytes zero_bytes() { return Bytes{}; }
inline Bytes load_bytes(const void *p) {
    Bytes a;
    __builtin_memcpy(a.v, p, sizeof(a.v));
    return a;
}
inline void store(std::uint8_t *p, Bytes a) { __builtin_memcpy(p, a.v, sizeof(a.v)); }
// Rows N, N + 1, .. of eight: four of `low`, then four of `high`; as the hidden layout has them.
template <int N> inline Bytes rows_from(Bytes low, Bytes high) {
    return each_byte([&](int i) { return i + 4 * N < 16 ? low.v[i + 4 * N] : high.v[i + 4 * N - 16]; });
}

// Lanes of four rows -> bytes, saturated to 0..255: for each four channels, row after row.
inline Bytes pack4(Int a, Int b, Int c, Int d) {
    const Int *const rows[4] = {&a, &b, &c, &d};
    return each_byte([&](int i) {
        const std::int32_t x = rows[i / 4]->v[i % 4];
        return x < 0 ? 0 : x > 255 ? 255 : x;
    });
}
// The same of a + z, ...; `z` holds int16, for each four channels twice.
inline Bytes pack4(Int a, Int b, Int c, Int d, Bytes z) {
    std::int16_t zero[8];
    __builtin_memcpy(zero, z.v, sizeof(zero));
    const Int *const rows[4] = {&a, &b, &c, &d};
    Int sums[4];
    for (int r = 0; r < 4; ++r)
        sums[r] = each_int([&](int i) { return rows[r]->v[i] + zero[i]; }); // both small: see to_int
    return pack4(sums[0], sums[1], sums[2], sums[3]);
}
// For each four channels: channel after channel, its four rows together; or back.
inline Bytes transpose4(Bytes a) {
    return each_byte([&](int i) { return a.v[i % 4 * 4 + i / 4]; });
}
// The lanes' lowest bytes, kLanes of them.
inline void store_low(std::uint8_t *p, Int a) {
    for (int i = 0; i < kLanes; ++i)
        p[i] = static_cast<std::uint8_t>(a.v[i]);
}

using Unsigned4 = Bytes;
struct Signed4 {
    std::int8_t v[16];
};
inline Unsigned4 as_unsigned(Bytes a) { return a; }
inline Signed4 as_signed(Bytes a) {
    Signed4 r;
    __builtin_memcpy(r.v, a.v, sizeof(r.v));
    return r;
}
inline Int dot4(Int acc, Unsigned4 u, Signed4 s) {
    return each_int([&](int i) {
        std::int32_t sum = acc.v[i];
        for (int k = 4 * i; k < 4 * i + 4; ++k)
            sum = wrapping_add(sum, u.v[k] * s.v[k]);
        return sum;
    });
}
inline Unsigned4 broadcast4(const std::uint8_t *p) {
    return each_byte([p](int i) { return p[i % 4]; });
}

} // namespace
} // namespace mnv2::MNV2_ISA
