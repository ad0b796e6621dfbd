// The register tile of the int8 matrix products: R rows x C columns of a row group, V vectors of output channels.
//
// An Input says where four bytes of a pixel lie, an Output what becomes of a column's accumulators. Sums are exact, so
// tiles of any size give the same bits.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kInt8Vecs = 2; // of a tile

// The pixels layout, of which int8_types.h has both forms: bytes from a column's vector of channels to the next, from
// its four channels to the next ones, and from its row to the next; and what writes a vector, of which pack4 gave the
// bytes. `column`: bytes from one to the next.
#ifdef MNV2_TILES
constexpr std::ptrdiff_t kPixelsVector = kLanes, kPixelsQuad = 4;
inline std::ptrdiff_t pixels_row(std::ptrdiff_t column) { return column / kGroup; }
inline void store_pixels(std::uint8_t *y, std::ptrdiff_t column, Bytes a) { store_rows(y, pixels_row(column), a); }
#else
constexpr std::ptrdiff_t kPixelsVector = kLanes * kGroup, kPixelsQuad = 4 * kGroup;
constexpr std::ptrdiff_t pixels_row(std::ptrdiff_t) { return 4; }
inline void store_pixels(std::uint8_t *y, std::ptrdiff_t, Bytes a) { store(y, a); }
#endif

struct Int8Columns {
    const std::uint8_t *x;
    std::ptrdiff_t column;

    static constexpr int kInner = 1; // quads that follow one another at 4 bytes
    const std::uint8_t *at(int outer, int r) const { return x + outer * kPixelsQuad + r * pixels_row(column); }
    Int8Columns from(int c) const { return {x + c * column, column}; }
};

template <int R, int C, int V, class Input, class Output>
inline void int8_tile(const Input &input, const std::int8_t *weight, int quads, Int8Ahead &ahead, const Output &output,
                      int vector, int column) {
    Int acc[V][C][R];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const Int bias = load(output.scales.bias + (vector + v) * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                acc[v][c][r] = bias;
    }
    const std::ptrdiff_t next = static_cast<std::ptrdiff_t>(quads) * kLanes * 4;
    const std::int8_t *later = ahead.next;
    for (int outer = 0; outer < quads / Input::kInner; ++outer) {
#pragma GCC unroll 3
        for (int inner = 0; inner < Input::kInner; ++inner, weight += kLanes * 4, later += kCacheLine) {
            if constexpr (Output::kFetches)
                __builtin_prefetch(later, 0, 2);
            Signed4 w[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                w[v] = as_signed(load_bytes(weight + v * next));
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const Unsigned4 u = broadcast4(input.at(outer, r) + c * input.column + inner * 4);
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v)
                        acc[v][c][r] = dot4(acc[v][c][r], u, w[v]);
                }
        }
    }
    if constexpr (Output::kFetches)
        ahead.next = later < ahead.end ? later : ahead.end;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            output.put(acc[v][c], vector + v, column + c);
}

// The widest tile whose accumulators fit the registers; there are tiles of 7, 4, 3, 2 and 1 columns.
template <int R, int V> constexpr int int8_widest() {
    constexpr int kFits = kInt8Pixels * kInt8Vecs / (R * V);
    return kFits >= 7 ? 7 : kFits >= 4 ? 4 : kFits > 0 ? kFits : 1;
}

// One tile of at most `width` columns; returns how many.
template <int R, int V, int C, class Input, class Output>
inline int int8_tile_of(int width, const Input &input, const std::int8_t *weight, int quads, Int8Ahead &ahead,
                        const Output &output, int vector, int column) {
    if constexpr (C > 1) {
        if (width < C)
            return int8_tile_of<R, V, C == 7 ? 4 : C - 1>(width, input, weight, quads, ahead, output, vector, column);
    }
    int8_tile<R, C, V>(input, weight, quads, ahead, output, vector, column);
    return C;
}

template <int R, int V, class Input, class Output>
inline void int8_rows(const Input &input, const std::int8_t *weight, int quads, Int8Ahead &ahead, const Output &output,
                      int vector, int columns) {
    constexpr int kWidest = int8_widest<R, V>();
    for (int c = 0; c < columns;) {
        const int left = columns - c, tiles = (left + kWidest - 1) / kWidest; // as even as may be: 7 = 3 + 2 + 2
        c += int8_tile_of<R, V, kWidest>((left + tiles - 1) / tiles, input.from(c), weight, quads, ahead, output,
                                         vector, c);
    }
}

// All columns of a row group of `rows` rows, V vectors of them.
template <int V, class Input, class Output>
inline void int8_group(int rows, const Input &input, const std::int8_t *weight, int quads, Int8Ahead &ahead,
                       const Output &output, int vector, int columns) {
    if (rows == 4)
        int8_rows<4, V>(input, weight, quads, ahead, output, vector, columns);
    else if (rows == 3)
        int8_rows<3, V>(input, weight, quads, ahead, output, vector, columns);
    else if (rows == 2)
        int8_rows<2, V>(input, weight, quads, ahead, output, vector, columns);
    else
        int8_rows<1, V>(input, weight, quads, ahead, output, vector, columns);
}

// The accumulators of up to four rows, the missing ones zero.
struct Int8Four {
    Int row[kGroup];
};

// rne(acc * scale)
template <int R> inline Int8Four int8_steps(const Int (&acc)[R], Vec scale) {
    Int8Four steps;
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; ++r)
        steps.row[r] = r < R ? to_int(mul(to_float(acc[r]), scale)) : zero_int();
    return steps;
}

inline Bytes pack4(const Int8Four &f) { return pack4(f.row[0], f.row[1], f.row[2], f.row[3]); }

// ReLU6: packing saturates to 0..255. To the hidden layout.
struct Int8Relu6 {
    Int8Scales scales;
    std::uint8_t *y; // of the row group
    std::ptrdiff_t y_vector, y_column;

    static constexpr bool kFetches = false; // few quads: it would cost more than it saves
    template <int R> inline __attribute__((always_inline)) void put(const Int (&acc)[R], int vector, int column) const {
        store(y + vector * y_vector + column * y_column, pack4(int8_steps(acc, load(scales.scale + vector * kLanes))));
    }
};

} // namespace
} // namespace mnv2::MNV2_ISA
