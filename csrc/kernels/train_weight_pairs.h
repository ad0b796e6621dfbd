// The weights' gradient of a 1x1 convolution in bf16: a matrix product over pairs of pixels, by matrix tiles where the
// ISA has them and by vectors of pairs elsewhere.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

#ifdef MNV2_TILES

// P x V tiles of sums over all pairs, K of them at a time.
template <int P, int V>
inline void weight_pairs_tile(const WeightPairsArgs &a, const bf16 *turned, const bf16 *columns, float *dw) {
    constexpr std::ptrdiff_t kPair = 2 * sizeof(bf16);
    const std::ptrdiff_t row = a.pairs * kPair, line = a.column_count * kPair;
    const auto at = [&](int p, int v) {
        return dw + (p * static_cast<std::ptrdiff_t>(a.column_count) + v) * kTileSize;
    };
    if (a.accumulate) {
        _tile_loadd(0, at(0, 0), line);
        if constexpr (V == 2)
            _tile_loadd(1, at(0, 1), line);
        if constexpr (P == 2)
            _tile_loadd(2, at(1, 0), line);
        if constexpr (P == 2 && V == 2)
            _tile_loadd(3, at(1, 1), line);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const bf16 *const second = turned + 2 * static_cast<std::ptrdiff_t>(kTileSize) * a.pairs;
    for (int k = 0; k < a.pairs; k += kTileSize) {
        const bf16 *const c = columns + 2 * static_cast<std::ptrdiff_t>(k) * a.column_count;
        _tile_loadd(4, turned + 2 * k, row);
        _tile_loadd(6, c, line);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V == 2) {
            _tile_loadd(7, c + 2 * kTileSize, line);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (P == 2) {
            _tile_loadd(5, second + 2 * k, row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (P == 2 && V == 2)
            _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, at(0, 0), line);
    if constexpr (V == 2)
        _tile_stored(1, at(0, 1), line);
    if constexpr (P == 2)
        _tile_stored(2, at(1, 0), line);
    if constexpr (P == 2 && V == 2)
        _tile_stored(3, at(1, 1), line);
}

template <int P> inline void weight_pairs_rows(const WeightPairsArgs &a, int r) {
    const bf16 *const turned = a.turned + 2 * static_cast<std::ptrdiff_t>(r) * a.pairs;
    float *const dw = a.dw + static_cast<std::ptrdiff_t>(r) * a.column_count;
    int c = 0;
    for (; c + 2 * kTileSize <= a.column_count; c += 2 * kTileSize)
        weight_pairs_tile<P, 2>(a, turned, a.columns + 2 * c, dw + c);
    if (c < a.column_count)
        weight_pairs_tile<P, 1>(a, turned, a.columns + 2 * c, dw + c);
}

// The left matrix of a tile's product has its pairs along the rows: those of `rows` are turned.
void train_weight_pairs(const WeightPairsArgs &a) {
    for (int r = 0; r < a.row_count; r += kTileSize)
        for (int k = 0; k < a.pairs; k += kTileSize)
            turn_pairs(a.rows + 2 * (static_cast<std::ptrdiff_t>(k) * a.row_count + r), a.row_count,
                       a.turned + 2 * (static_cast<std::ptrdiff_t>(r) * a.pairs + k), a.pairs);
    const Tiles tiles(kTileSize, kTileSize);
    int r = 0;
    for (; r + 2 * kTileSize <= a.row_count; r += 2 * kTileSize)
        weight_pairs_rows<2>(a, r);
    if (r < a.row_count)
        weight_pairs_rows<1>(a, r);
}

#else

template <int V> inline void weight_pairs_tile(const WeightPairsArgs &a, int r, int c) {
    Vec acc[kWeightRows][V];
    float *const dw = a.dw + static_cast<std::ptrdiff_t>(r) * a.column_count + c;
#pragma GCC unroll 8
    for (int i = 0; i < kWeightRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            acc[i][v] = a.accumulate ? load(dw + i * a.column_count + v * kLanes) : zero();
    const bf16 *rows = a.rows + 2 * r, *columns = a.columns + 2 * c;
    for (int k = 0; k < a.pairs; ++k, rows += 2 * a.row_count, columns += 2 * a.column_count) {
        Vec at[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            at[v] = load_pairs(columns + 2 * v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kWeightRows; ++i) {
            const Vec row = broadcast_pair(rows + 2 * i);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[i][v] = dot2(acc[i][v], row, at[v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kWeightRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            store(dw + i * a.column_count + v * kLanes, acc[i][v]);
}

void train_weight_pairs(const WeightPairsArgs &a) {
    static_assert(kLanes % kWeightRows == 0, "whole vectors of rows are whole tiles");
    for (int r = 0; r < a.row_count; r += kWeightRows) {
        int c = 0;
        for (; c + 2 * kLanes <= a.column_count; c += 2 * kLanes)
            weight_pairs_tile<2>(a, r, c);
        if (c < a.column_count)
            weight_pairs_tile<1>(a, r, c);
    }
}

#endif

} // namespace
} // namespace mnv2::MNV2_ISA
