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
