// The matrix products of the int8 1x1 layers by matrix tiles: 16 pixels x 64 channels times 64 channels x 16 is one
// instruction, and four of them share two tiles of pixels and two of weights.
//
// A pixel of the pixels layout is a row of a tile, four columns of a row group are a tile of pixels; packed weights are
// tiles as they lie. Sums are exact, so they are those of int8_tile.h, bit for bit. An image takes 1.23 ms on a Xeon of
// the Emerald Rapids family, and 1.38 by vpdpbusd.
#pragma once

#ifdef MNV2_TILES

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kTileColumns = kTileSize / kGroup;
constexpr int kTileSums = kTileSize * kTileSize;

// Quads that a tile takes at a time: the most that all tiles can share evenly, so that none reads past a pixel.
inline int int8_tile_depth(int quads) {
    int depth = min(quads, kTileSize);
    while (quads % depth != 0)
        --depth;
    return depth;
}

// P tiles of pixels times V of weights.
struct Int8TileProduct {
    const std::uint8_t *x, *second; // the tiles' pixels
    std::ptrdiff_t pixel;           // bytes from one to the next
    const std::int8_t *weight;
    std::ptrdiff_t next; // bytes to the next vector's weights
    const std::int32_t *bias;
    int depth;
    int blocks;
};

// V tiles of weights, from their first quad on.
template <int V> inline void int8_tile_weights(const std::int8_t *weight, std::ptrdiff_t next) {
    _tile_loadd(6, weight, kTileSize * 4);
    if constexpr (V == 2)
        _tile_loadd(7, weight + next, kTileSize * 4);
}

// Sums begin with the bias: a tile of rows that lie in one place. The weights of a single block are in their tiles
// already. Tiles are loaded again as soon as their last product has begun: 1% of an image.
template <int P, int V> inline void int8_tile_product(const Int8TileProduct &t) {
    _tile_loadd(0, t.bias, 0);
    if constexpr (V == 2)
        _tile_loadd(1, t.bias + kTileSize, 0);
    if constexpr (P == 2)
        _tile_loadd(2, t.bias, 0);
    if constexpr (P == 2 && V == 2)
        _tile_loadd(3, t.bias + kTileSize, 0);
    const std::ptrdiff_t step = static_cast<std::ptrdiff_t>(t.depth) * 4;
    const std::uint8_t *x = t.x, *second = t.second;
    const std::int8_t *weight = t.weight;
    _tile_loadd(4, x, t.pixel);
    if (t.blocks > 1)
        int8_tile_weights<V>(weight, t.next);
    for (int b = 1;; ++b) {
        const bool more = b < t.blocks;
        x += step;
        weight += step * kTileSize;
        _tile_dpbusd(0, 4, 6);
        if constexpr (V == 2)
            _tile_dpbusd(1, 4, 7);
        if (more)
            _tile_loadd(4, x, t.pixel);
        if constexpr (P == 2) {
            _tile_loadd(5, second, t.pixel);
            _tile_dpbusd(2, 5, 6);
        }
        if (more)
            _tile_loadd(6, weight, kTileSize * 4);
        if constexpr (P == 2 && V == 2)
            _tile_dpbusd(3, 5, 7);
        if (!more)
            return;
        second += step;
        if constexpr (V == 2)
            _tile_loadd(7, weight + t.next, kTileSize * 4);
    }
}

// Columns of row groups that follow one another in memory, of which the last have fewer rows.
struct Int8Run {
    const std::uint8_t *x;
    int columns;
    int whole; // columns of four rows
    int rows;  // of the others
};

// V vectors of a run of columns, eight at a time; a last tile begins early enough to be a whole one.
template <int V, class Output> class Int8TileRun {
  public:
    Int8TileRun(const Int8Matrix &m, const Int8Run &run, int vector, int depth, const Output &output)
        : m_(m), run_(run), vector_(vector), output_(output), tile_(min(run.columns, kTileColumns)),
          last_(run.columns - tile_) {
        const std::ptrdiff_t next = static_cast<std::ptrdiff_t>(m.quads) * kLanes * 4;
        product_ = {nullptr,
                    nullptr,
                    m.x.column / kGroup,
                    m.weight + vector * next,
                    next,
                    m.scales.bias + vector * kLanes,
                    depth,
                    m.quads / depth};
    }

    // Each tile's sums are finished a turn after they were stored, in the room that those of this turn are stored to
    // then: a load waits for a tile's store under way, and for one whose address differs by 4 KB, as a second room's
    // would (7% of an image).
    inline void run() {
        if (product_.blocks == 1)
            int8_tile_weights<V>(product_.weight, product_.next);
        for (int c = 0; c < run_.columns + kStep; c += kStep) {
            const int tiles = c >= run_.columns ? 0 : c + kTileColumns < run_.columns ? 2 : 1;
            if (tiles != 0)
                multiply(c, tiles);
            if (c > 0)
                finish<0>(c - kStep);
            if (tiles > 0)
                _tile_stored(0, sums_, kTileSize * 4);
            if (V == 2 && c > 0)
                finish<1>(c - kStep);
            if (V == 2 && tiles > 0)
                _tile_stored(1, sums_ + kTileSums, kTileSize * 4);
            if (c > 0)
                finish<2>(c - kStep);
            if (tiles > 1)
                _tile_stored(2, sums_ + 2 * kTileSums, kTileSize * 4);
            if (V == 2 && c > 0)
                finish<3>(c - kStep);
            if (V == 2 && tiles > 1)
                _tile_stored(3, sums_ + 3 * kTileSums, kTileSize * 4);
        }
    }

  private:
    static constexpr int kStep = 2 * kTileColumns;

    int start(int c) const { return min(c, last_); } // of the tile with column c

    inline void multiply(int c, int tiles) {
        product_.x = run_.x + start(c) * m_.x.column;
        product_.second = run_.x + start(c + kTileColumns) * m_.x.column;
        if (tiles == 2)
            int8_tile_product<2, V>(product_);
        else
            int8_tile_product<1, V>(product_);
        if constexpr (Output::kFetches) {
            // As many lines as vectors of int8_tile.h would have fetched by here (the classifier from 43 to 40 us).
            const std::int8_t *later = m_.ahead->next;
            for (int q = 0; q < 3 * m_.quads; ++q, later += kCacheLine)
                __builtin_prefetch(later, 0, 2);
            m_.ahead->next = later < m_.ahead->end ? later : m_.ahead->end;
        }
    }

    // One tile's sums of the step that began with column c.
    template <int Tile> inline void finish(int c) const {
        c += Tile / 2 * kTileColumns;
        const int end = min(c + kTileColumns, run_.columns);
        const std::int32_t *sums = sums_ + Tile * kTileSums + (c - start(c)) * kGroup * kTileSize;
        for (; c < end; ++c, sums += kGroup * kTileSize) {
            Int acc[kGroup];
#pragma GCC unroll 4
            for (int r = 0; r < kGroup; ++r)
                acc[r] = load(sums + r * kTileSize);
            if (__builtin_expect(c >= run_.whole, 0)) {
#pragma GCC unroll 4
                for (int r = 0; r < kGroup; ++r)
                    acc[r] = r < run_.rows ? acc[r] : zero_int();
            }
            output_.put(acc, vector_ + Tile % 2, c);
        }
    }

    const Int8Matrix &m_;
    const Int8Run run_;
    const int vector_;
    const Output output_;
    const int tile_, last_; // columns of a tile, and the first of the last tile
    Int8TileProduct product_;
    alignas(kCacheLine) std::int32_t sums_[4 * kTileSums];
};

constexpr int kMostColumns = 1 << 20; // of a run, far from an int's end

// All of a matrix product; output(g): what becomes of the sums of row group g and of those that follow it in memory.
template <class F> inline void int8_by_tiles(const Int8Matrix &m, const F &output) {
    const bool joined = m.x.group == m.x.columns * m.x.column && // as are the output's groups then
                        m.x.columns * static_cast<std::ptrdiff_t>(m.x.groups) <= kMostColumns;
    const int runs = joined ? 1 : m.x.groups, columns = joined ? m.x.groups * m.x.columns : m.x.columns;
    const int depth = int8_tile_depth(m.quads);
    using Output = decltype(output(0));
    const Tiles tiles(min(columns, kTileColumns) * kGroup, depth);
    for (int v = m.vector_begin; v < m.vector_end; v += kInt8Vecs)
        for (int g = 0; g < runs; ++g) {
            const bool last = g + 1 == runs && m.x.last_rows < kGroup;
            const Int8Run run{m.x.x + g * m.x.group, columns, last ? columns - m.x.columns : columns, m.x.last_rows};
            if (v + kInt8Vecs <= m.vector_end)
                Int8TileRun<kInt8Vecs, Output>(m, run, v, depth, output(g)).run();
            else
                Int8TileRun<1, Output>(m, run, v, depth, output(g)).run();
        }
}

} // namespace
} // namespace mnv2::MNV2_ISA

#endif
