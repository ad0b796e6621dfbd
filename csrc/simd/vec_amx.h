// AVX-512 with AMX: tiles of 16 rows of 64 bytes, and the matrix product of two of them.
#pragma once

#include "vec_avx512bf16.h"

#define MNV2_TILES

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kTileSize = 16; // rows of a tile, and its columns of 4 bytes

// Bytes of four rows, 16 channels each, as pack4 gives them: for each four channels, row after row.
inline void store_rows(std::uint8_t *y, std::ptrdiff_t row, Bytes a) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i rows = _mm512_permutexvar_epi32(order, a.v);
    const auto at = [=](int r) { return reinterpret_cast<__m128i *>(y + r * row); };
    _mm_storeu_si128(at(0), _mm512_castsi512_si128(rows));
    _mm_storeu_si128(at(1), _mm512_extracti32x4_epi32(rows, 1));
    _mm_storeu_si128(at(2), _mm512_extracti32x4_epi32(rows, 2));
    _mm_storeu_si128(at(3), _mm512_extracti32x4_epi32(rows, 3));
}

// A square of 16 x 16 pairs, its rows for its columns. `from_ld` and `to_ld`: pairs of a row.
inline void turn_pairs(const bf16 *from, std::ptrdiff_t from_ld, bf16 *to, std::ptrdiff_t to_ld) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        a[i] = _mm512_loadu_si512(from + 2 * i * from_ld);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    // a[4 g + c]: of rows 4 g to 4 g + 3 the columns c, c + 4, c + 8 and c + 12, one in each quarter.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        b[c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        b[4 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        b[12 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        _mm512_storeu_si512(to + 2 * c * to_ld, _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88));
        _mm512_storeu_si512(to + 2 * (c + 8) * to_ld, _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd));
        _mm512_storeu_si512(to + 2 * (c + 4) * to_ld, _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88));
        _mm512_storeu_si512(to + 2 * (c + 12) * to_ld, _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd));
    }
}

// What LDTILECFG reads (Intel SDM vol. 1, 18.2). Tiles 0..3 are sums, 4 and 5 of the left matrix, 6 and 7 of the right.
class Tiles {
  public:
    // Sums of `rows` rows, over `quads` x 4 bytes at a time.
    Tiles(int rows, int quads) {
        Config c{};
        c.palette = 1;
        for (int i = 0; i < 8; ++i) {
            c.rows[i] = static_cast<std::uint8_t>(i < 6 ? rows : quads);
            c.bytes[i] = static_cast<std::uint16_t>(i == 4 || i == 5 ? quads * 4 : kTileSize * 4);
        }
        __asm__ volatile("ldtilecfg %0" : : "m"(c)); // GCC 12's own intrinsic says that it reads 8 bytes of it
    }
    ~Tiles() { _tile_release(); } // or every switch of threads saves 8 KB
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

  private:
    struct Config {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t bytes[16];
        std::uint8_t rows[16];
    };
};

} // namespace
} // namespace mnv2::MNV2_ISA
