// The 1x1 layers in int8: expand, project, the head with its pool, the classifier.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// All of a matrix product; output(g): what becomes of the sums of row group g. Vectors are outside, so that a tile's
// weights stay in L1 while the pixels pass.
template <class F> inline void int8_by_vectors(const Int8Matrix &m, const F &output) {
    for (int v = m.vector_begin; v < m.vector_end; v += kInt8Vecs) {
        const std::int8_t *const weight = m.weight + static_cast<std::ptrdiff_t>(v) * m.quads * kLanes * 4;
        for (int g = 0; g < m.x.groups; ++g) {
            const Int8Columns input{m.x.x + g * m.x.group, m.x.column};
            const int rows = g + 1 == m.x.groups ? m.x.last_rows : kGroup;
            if (v + kInt8Vecs <= m.vector_end)
                int8_group<kInt8Vecs>(rows, input, weight, m.quads, *m.ahead, output(g), v, m.x.columns);
            else
                int8_group<1>(rows, input, weight, m.quads, *m.ahead, output(g), v, m.x.columns);
        }
    }
}

#ifdef MNV2_TILES
template <class F> inline void int8_matrix(const Int8Matrix &m, const F &output) { int8_by_tiles(m, output); }

// Tiles are slower where their results outnumber what goes into them (16 to 96 channels of 112 x 112: 225 us, 200 by
// vectors) and where their inputs have no large divisor.
inline bool tiles_expand(int quads) { return quads > 4 && int8_tile_depth(quads) > 2; }
#else
template <class F> inline void int8_matrix(const Int8Matrix &m, const F &output) { int8_by_vectors(m, output); }

constexpr bool tiles_expand(int) { return true; } // as int8_matrix does
#endif

void int8_expand(const Int8ExpandArgs &a) {
    const auto output = [&](int g) { return Int8Relu6{a.m.scales, a.y.y + g * a.y.group, a.y.vector, a.y.column}; };
    if (tiles_expand(a.m.quads))
        int8_matrix(a.m, output);
    else
        int8_by_vectors(a.m, output);
}

struct Int8Linear {
    Int8Scales scales;
    std::uint8_t *y; // of the row group
    std::ptrdiff_t y_column;
    float *v;
    std::ptrdiff_t v_column, v_row;
    bool add, keep;

    static constexpr bool kFetches = true;
    template <int R> inline __attribute__((always_inline)) void put(const Int (&acc)[R], int vector, int column) const {
        const Vec scale = load(scales.scale + vector * kLanes);
        const Vec output_scale = load(scales.output_scale + vector * kLanes);
        float *const at = v + column * v_column + vector * kLanes;
        Int8Four steps;
#pragma GCC unroll 4
        for (int r = 0; r < kGroup; ++r) {
            if (r >= R) {
                steps.row[r] = zero_int();
                continue;
            }
            Vec value = mul(to_float(acc[r]), scale);
            if (add)
                value = MNV2_ISA::add(value, load(at + r * v_row));
            if (keep)
                store(at + r * v_row, value);
            steps.row[r] = to_int(mul(value, output_scale));
        }
        const Bytes zero = load_bytes(scales.zero + vector * kLanes * 2);
        store_pixels(y + vector * kPixelsVector + column * y_column, y_column,
                     pack4(steps.row[0], steps.row[1], steps.row[2], steps.row[3], zero));
    }
};

void int8_project(const Int8ProjectArgs &a) {
    int8_matrix(a.m, [&](int g) {
        return Int8Linear{a.m.scales, a.y + g * a.y_group, a.y_column, a.v + g * a.v_group, a.v_column, a.v_row, a.add,
                          a.keep};
    });
}

inline Signed4 signed_ones() {
    std::int8_t ones[kLanes * 4];
    for (std::int8_t &one : ones)
        one = 1;
    return as_signed(load_bytes(ones));
}

// Sums over rows by a dot product with ones: four rows of a channel are the four bytes of a lane.
struct Int8Sums {
    Int8Scales scales;
    Int *sums; // of this tile's vectors
    int first; // of them

    static constexpr bool kFetches = true;
    template <int R> inline __attribute__((always_inline)) void put(const Int (&acc)[R], int vector, int) const {
        const Bytes rows = transpose4(pack4(int8_steps(acc, load(scales.scale + vector * kLanes))));
        Int &sum = sums[vector - first];
        sum = dot4(sum, as_unsigned(rows), signed_ones());
    }
};

void int8_head(const Int8HeadArgs &a) {
    Int8Matrix m = a.m;
    for (int v = a.m.vector_begin; v < a.m.vector_end; v += kInt8Vecs) {
        Int sums[kInt8Vecs];
        for (Int &sum : sums)
            sum = zero_int();
        m.vector_begin = v;
        m.vector_end = min(v + kInt8Vecs, a.m.vector_end);
        int8_matrix(m, [&](int) { return Int8Sums{m.scales, sums, v}; });
        for (int i = 0; i < m.vector_end - v; ++i) {
            std::int32_t lanes[kLanes];
            store(lanes, sums[i]);
            for (int lane = 0; lane < kLanes; ++lane)
                a.sums[(v + i) * kLanes + lane] += lanes[lane];
        }
    }
}

// R images x V vectors. Features have up to 13 bits: their low and high bytes are summed apart, 256 to one.
template <int R, int V> void int8_classify_tile(const Int8ClassifyArgs &a, int image, int vector) {
    const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(a.quads) * kGroup * 4;
    const std::uint8_t *const low = a.features + image / kGroup * 2 * plane, *const high = low + plane;
    const std::ptrdiff_t next = static_cast<std::ptrdiff_t>(a.quads) * kLanes * 4;
    const std::int8_t *weight = a.weight + vector * next;
    Int lows[V][R], highs[V][R];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            lows[v][r] = load(a.scales.bias + (vector + v) * kLanes);
            highs[v][r] = zero_int();
        }
    for (int k = 0; k < a.quads; ++k, weight += kLanes * 4) {
        Signed4 w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            w[v] = as_signed(load_bytes(weight + v * next));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Unsigned4 l = broadcast4(low + (k * kGroup + r) * 4), h = broadcast4(high + (k * kGroup + r) * 4);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                lows[v][r] = dot4(lows[v][r], l, w[v]);
                highs[v][r] = dot4(highs[v][r], h, w[v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        const int n = (vector + v) * kLanes, left = a.classes - n;
        const Vec scale = load(a.scales.scale + n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec logits = mul(to_float(add(lows[v][r], shift_left<8>(highs[v][r]))), scale);
            float *const y = a.y + (image + r) * a.y_ld + n;
            if (left >= kLanes)
                store(y, logits);
            else
                store_first(y, logits, left);
        }
    }
}

// Few images take more vectors, so that enough sums are under way.
template <int V> void int8_classify_images(const Int8ClassifyArgs &a, int vector) {
    for (int image = 0; image < a.images; image += kGroup) {
        const int rows = min(a.images - image, kGroup);
        if (rows == 4)
            int8_classify_tile<4, V>(a, image, vector);
        else if (rows == 3)
            int8_classify_tile<3, V>(a, image, vector);
        else if (rows == 2)
            int8_classify_tile<2, V>(a, image, vector);
        else
            int8_classify_tile<1, V>(a, image, vector);
    }
}

void int8_classify(const Int8ClassifyArgs &a) {
    int v = a.vector_begin;
    for (; a.images == 1 && v + 4 <= a.vector_end; v += 4)
        int8_classify_tile<1, 4>(a, 0, v);
    for (; v + 2 <= a.vector_end; v += 2)
        int8_classify_images<2>(a, v);
    for (; v < a.vector_end; ++v)
        int8_classify_images<1>(a, v);
}

} // namespace
} // namespace mnv2::MNV2_ISA
