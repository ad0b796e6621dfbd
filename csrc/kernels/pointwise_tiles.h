// 1x1 convolution in bf16 by matrix tiles: 16 pixels x 32 inputs times 32 inputs x 16 channels is one instruction, and
// four of them share two tiles of pixels and two of weights.
//
// Pixels are read where they lie; weights are the pairs of pointwise_pairs.h, of which 16 rows are a tile. A channel's
// sum takes the inputs in one order, its bias last, whatever the place of its pixel in a tile.
// An image takes 2.0 ms on a Xeon of the Emerald Rapids family, and 5.0 with float32 arithmetic on bf16 weights.
#pragma once

#ifdef MNV2_TILES

namespace mnv2::MNV2_ISA {
namespace {

// Inputs that a tile takes at a time: the most that all tiles can share evenly, so that none reads past a pixel, or 0
// where that is less than a quarter of a tile.
inline int tile_depth(int cin) {
    for (int depth = 2 * kTileSize; depth >= 8; depth -= 2)
        if (cin % depth == 0)
            return depth;
    return 0;
}

// V tiles of weights, from their first pair on.
template <int V> inline void tile_weights(const bf16 *w) {
    constexpr std::ptrdiff_t kRow = V * kTileSize * 2 * sizeof(bf16);
    _tile_loadd(6, w, kRow);
    if constexpr (V == 2)
        _tile_loadd(7, w + 2 * kTileSize, kRow);
}

// Tiles of sums to pixels from p and, of two, from q on of y.
template <int P, int V> inline void tile_store(float *y, std::ptrdiff_t ld, std::ptrdiff_t p, std::ptrdiff_t q) {
    const std::ptrdiff_t line = ld * static_cast<std::ptrdiff_t>(sizeof(float));
    _tile_stored(0, y + p * ld, line);
    if constexpr (V == 2)
        _tile_stored(1, y + p * ld + kTileSize, line);
    if constexpr (P == 2)
        _tile_stored(2, y + q * ld, line);
    if constexpr (P == 2 && V == 2)
        _tile_stored(3, y + q * ld + kTileSize, line);
}

// P tiles of pixels, at x and at `second`, times V tiles of channels. The weights of a single block are in their tiles
// already. Tiles are loaded again as soon as their last product has begun: 3% of a layer of 64 inputs or more.
template <int P, int V>
inline void tile_product(const bf16 *x, const bf16 *second, std::ptrdiff_t ld, const bf16 *w, int depth, int blocks) {
    constexpr std::ptrdiff_t kRow = V * kTileSize * 2 * sizeof(bf16);
    const std::ptrdiff_t pixel = ld * static_cast<std::ptrdiff_t>(sizeof(bf16));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, x, pixel);
    if (blocks > 1)
        tile_weights<V>(w);
    for (int b = 1;; ++b) {
        const bool more = b < blocks;
        x += depth;
        w += depth * V * kTileSize;
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (V == 2)
            _tile_dpbf16ps(1, 4, 7);
        if (more)
            _tile_loadd(4, x, pixel);
        if constexpr (P == 2) {
            _tile_loadd(5, second, pixel);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (more)
            _tile_loadd(6, w, kRow);
        if constexpr (P == 2 && V == 2)
            _tile_dpbf16ps(3, 5, 7);
        if (!more)
            return;
        second += depth;
        if constexpr (V == 2)
            _tile_loadd(7, w + 2 * kTileSize, kRow);
    }
}

// Pixels [from, to) of a tile's sums to the output, of which `pixel` is the tile's first.
template <int V, class Y>
inline void tile_finish(const float *sums, int from, int to, const Pointwise<bf16, bf16, Y> &a, std::ptrdiff_t pixel,
                        int n) {
    constexpr int kRows = 8 / V;
    Vec bias[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
        bias[v] = a.bias ? load_once(a.bias + n + v * kLanes) : zero();
    const auto part = [&](auto &acc, int r) __attribute__((always_inline)) {
        constexpr int R = sizeof acc / sizeof acc[0];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[i][v] = add(load(sums + ((r + i) * V + v) * kTileSize), bias[v]);
        const std::ptrdiff_t p = pixel + r;
        finish<R, V>(acc, EpilogueTo<Y>{a.residual ? a.residual + p * a.residual_ld + n : nullptr, a.residual_ld,
                                        a.y + p * a.y_ld + n, a.y_ld, a.cout - n, a.relu6, false});
    };
    int r = from;
    for (; r + kRows <= to; r += kRows) {
        Vec acc[kRows][V];
        part(acc, r);
    }
    for (; r < to; ++r) {
        Vec acc[1][V];
        part(acc, r);
    }
}

// All pixels for one panel, of whole tiles of channels, where the sums are the output as they are.
template <int V>
inline void tile_sums(const PointwiseBf16FloatArgs &a, const bf16 *w, int n, int depth, int blocks, int rows) {
    const auto start = [last = a.pixels - rows](std::ptrdiff_t p) { return p < last ? p : last; };
    if (blocks == 1)
        tile_weights<V>(w);
    for (std::ptrdiff_t p = 0; p < a.pixels; p += 2 * kTileSize) {
        const std::ptrdiff_t at = start(p), second = start(p + kTileSize);
        const bf16 *const x = a.x + at * a.x_ld;
        if (p + kTileSize < a.pixels) {
            tile_product<2, V>(x, a.x + second * a.x_ld, a.x_ld, w, depth, blocks);
            tile_store<2, V>(a.y + n, a.y_ld, at, second);
        } else {
            tile_product<1, V>(x, x, a.x_ld, w, depth, blocks);
            tile_store<1, V>(a.y + n, a.y_ld, at, 0);
        }
    }
}

// All pixels for one panel, 32 at a time; the last tile begins early enough to be a whole one. Sums are finished a turn
// after their tiles were stored, since vectors of a store under way wait for it (6% of an image).
template <int V, class Y>
inline void tile_panel(const Pointwise<bf16, bf16, Y> &a, const bf16 *w, int n, int depth, int blocks, int rows) {
    constexpr int kStep = 2 * kTileSize, kSums = kTileSize * V * kTileSize;
    if constexpr (sizeof(Y) == sizeof(float))
        if (!a.bias && !a.residual && !a.relu6 && a.cout - n >= V * kTileSize)
            return tile_sums<V>(a, w, n, depth, blocks, rows);
    alignas(kCacheLine) float sums[2][2 * kSums];
    const auto start = [last = a.pixels - rows](std::ptrdiff_t p) { return p < last ? p : last; };
    const auto finish_step = [&](std::ptrdiff_t p, const float *done) {
        tile_finish<V>(done, static_cast<int>(p - start(p)), rows, a, start(p), n);
        if (p + kTileSize < a.pixels)
            tile_finish<V>(done + kSums, static_cast<int>(p + kTileSize - start(p + kTileSize)), rows, a,
                           start(p + kTileSize), n);
    };
    if (blocks == 1)
        tile_weights<V>(w);
    int turn = 0;
    for (std::ptrdiff_t p = 0; p < a.pixels; p += kStep, turn ^= 1) {
        const bf16 *const x = a.x + start(p) * a.x_ld;
        if (p + kTileSize < a.pixels) {
            tile_product<2, V>(x, a.x + start(p + kTileSize) * a.x_ld, a.x_ld, w, depth, blocks);
            tile_store<2, V>(sums[turn], V * kTileSize, 0, kTileSize);
        } else {
            tile_product<1, V>(x, x, a.x_ld, w, depth, blocks);
            tile_store<1, V>(sums[turn], V * kTileSize, 0, 0);
        }
        if (p > 0)
            finish_step(p - kStep, sums[turn ^ 1]);
    }
    finish_step((a.pixels - 1) / kStep * kStep, sums[turn ^ 1]);
}

template <class Y> void pointwise_tiles(const Pointwise<bf16, bf16, Y> &a, int depth) {
    const int rows = min(a.pixels, kTileSize);
    if (rows == 0)
        return;
    const Tiles tiles(rows, depth / 2);
    for (int panel = a.panel_begin; panel < a.panel_end; ++panel) {
        const int n = panel * kPanel;
        const bf16 *const w = a.weight + static_cast<std::ptrdiff_t>(n) * a.cin;
        if (a.cout - n > kLanes)
            tile_panel<2>(a, w, n, depth, a.cin / depth, rows);
        else
            tile_panel<1>(a, w, n, depth, a.cin / depth, rows);
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA

#endif
