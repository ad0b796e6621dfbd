// The register tile that the pointwise convolution and the stem share: R pixels x V vectors of output channels.
//
// Included once per ISA, inside that ISA's namespace. Each output is bias + x0*w0 + x1*w1 + ... in this order whatever
// the tile's size, so that an answer does not depend on the batch, the threads or the position in the image. More than
// kChunk inputs are summed in chunks: one long sum of 1280 made the logits' error 2.3 times torch's.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kPanel = kTileVecs * kLanes;
constexpr int kHalf = kLanes / 2;
constexpr int kChunk = 512;
static_assert(kTileVecs == 2, "a panel is two vectors wide, or one where one is enough");

template <class Y> struct EpilogueTo {
    const Y *residual;
    std::ptrdiff_t residual_ld;
    Y *y;
    std::ptrdiff_t y_ld;
    int channels; // of the tensor, from y on
    bool relu6;
    bool accumulate; // y holds the sum over earlier inputs, bias included: add to it
};
using Epilogue = EpilogueTo<float>;

// The loops over R and V are unrolled by name: left to itself the compiler keeps the accumulators in memory around the
// epilogue (16 inputs: 66 GMAC/s instead of 105 on a core whose peak is 129).
template <int R, int V, class Y> inline void finish(Vec (&acc)[R][V], const EpilogueTo<Y> &e) {
    if (e.accumulate) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            const int left = e.channels - v * kLanes;
            const Y *const y = e.y + v * kLanes;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
                acc[r][v] = add(acc[r][v], left >= kLanes ? load(y + r * e.y_ld) : load_first(y + r * e.y_ld, left));
        }
    }
    if (e.relu6 && e.residual == nullptr && e.channels >= V * kLanes) {
        // Each sum is stored as soon as it is clamped: 1% of a layer of 16 or 24 inputs.
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                store(e.y + r * e.y_ld + v * kLanes, relu6(acc[r][v]));
        return;
    }
    if (e.relu6) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[r][v] = relu6(acc[r][v]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const int left = e.channels - v * kLanes;
        Y *const y = e.y + v * kLanes;
        const Y *const residual = e.residual ? e.residual + v * kLanes : nullptr;
        if (left >= kLanes) {
            if (e.residual != nullptr) {
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r)
                    acc[r][v] = add(acc[r][v], load(residual + r * e.residual_ld));
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
                store(y + r * e.y_ld, acc[r][v]);
        } else if (left > 0) {
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                if (e.residual != nullptr)
                    acc[r][v] = add(acc[r][v], load_first(residual + r * e.residual_ld, left));
                store_first(y + r * e.y_ld, acc[r][v], left);
            }
        }
    }
}

// What is read soon into L2, as many lines as were just read: the next panel's or layer's weights, which come from L3.
// An image is 7% slower without.
template <int V> inline void prefetch_panel(const float *ahead) {
    constexpr int kLine = 16;
#pragma GCC unroll 2
    for (int i = 0; i < V * kLanes; i += kLine)
        __builtin_prefetch(ahead + i, 0, 2);
}

// Input::Walk<R> gives pixel r's input at(r), from the first input on, and pair(r), that one and the one after it in
// alternate lanes; next() moves it to the next one.
template <int R, int V, class Input>
inline __attribute__((always_inline)) void gemm_tile(const Input &input, const float *w, const float *bias, int depth,
                                                     const float *ahead, const Epilogue &e) {
    Vec acc[R][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const Vec b = bias ? load(bias + v * kLanes) : zero();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            acc[r][v] = b;
    }
    typename Input::template Walk<R> walk(input);
    for (int k = 0; k < depth; ++k, w += V * kLanes, ahead += V * kLanes, walk.next()) {
        Vec wk[V];
        prefetch_panel<V>(ahead);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            wk[v] = load(w + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = broadcast(walk.at(r));
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[r][v] = fma(x, wk[v], acc[r][v]);
        }
    }
    finish<R, V>(acc, e);
}

// The epilogue of one channel vector and a half: `high` holds the half of two pixels each.
template <int R, class Y> inline void finish_halves(Vec (&high)[(R + 1) / 2], const EpilogueTo<Y> &e) {
    const int channels = e.channels - kLanes;
    Y *const y = e.y + kLanes;
    const Y *const residual = e.residual ? e.residual + kLanes : nullptr;
#pragma GCC unroll 8
    for (int i = 0; i < (R + 1) / 2; ++i) {
        Vec a = high[i];
        const int r = 2 * i;
        if (channels == kHalf && r + 1 < R) {
            if (e.accumulate)
                a = add(a, load_halves(y + r * e.y_ld, y + (r + 1) * e.y_ld));
            if (e.relu6)
                a = relu6(a);
            if (e.residual != nullptr)
                a = add(a, load_halves(residual + r * e.residual_ld, residual + (r + 1) * e.residual_ld));
            store_halves(y + r * e.y_ld, y + (r + 1) * e.y_ld, a);
            continue;
        }
        for (int half = 0; half < 2 && r + half < R; ++half) {
            // The half of this pixel first, then as any other tail.
            Vec one[1][1] = {{half == 0 ? a : upper(a)}};
            const std::ptrdiff_t row = r + half;
            finish<1, 1>(one, EpilogueTo<Y>{residual ? residual + row * e.residual_ld : nullptr, 0, y + row * e.y_ld, 0,
                                            channels, e.relu6, e.accumulate});
        }
    }
}

// R pixels x one vector and a half. The half takes two inputs at once, one in its even lanes and one in its odd ones,
// and adds both up at the end: 24 channels of two inputs are three multiply-adds where two vectors take four.
template <int R, class Input>
inline __attribute__((always_inline)) void gemm_tile_halves(const Input &input, const float *w, const float *bias,
                                                            int depth, const float *ahead, const Epilogue &e) {
    Vec low[R][1], pairs[R];
    const Vec bias_low = bias ? load(bias) : zero();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        low[r][0] = bias_low;
        pairs[r] = zero();
    }
    typename Input::template Walk<R> walk(input);
    const auto one = [&](const float *row) __attribute__((always_inline)) {
        const Vec weight = load(row);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            low[r][0] = fma(broadcast(walk.at(r)), weight, low[r][0]);
    };
    int k = 0;
    for (; k + 1 < depth; k += 2, w += 2 * kPanel, ahead += 2 * kPanel) {
        prefetch_panel<kTileVecs>(ahead);
        prefetch_panel<kTileVecs>(ahead + kPanel);
        const Vec weight = load(w + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            pairs[r] = fma(walk.pair(r), weight, pairs[r]);
        one(w);
        walk.next();
        one(w + kPanel);
        walk.next();
    }
    if (k < depth) {
        const Vec weight = load(w + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            pairs[r] = fma(alternate(broadcast(walk.at(r)), zero()), weight, pairs[r]);
        one(w);
    }
    const Vec bias_high = bias ? load(bias + kLanes) : zero();
    Vec high[(R + 1) / 2];
#pragma GCC unroll 8
    for (int i = 0; i < (R + 1) / 2; ++i)
        high[i] = add(bias_high, sum_pairs(pairs[2 * i], pairs[2 * i + 1 < R ? 2 * i + 1 : 2 * i]));
    finish<R, 1>(low, e);
    finish_halves<R>(high, e);
}

// Half vectors of output channels that a tile takes: 2, 3 or 4.
inline int tile_halves(int channels) { return channels <= kLanes ? 2 : channels <= kLanes + kHalf ? 3 : 4; }

// The tile of that width.
template <int R, int kHalves, class Input>
inline __attribute__((always_inline)) void gemm_tile_of(const Input &input, const float *w, const float *bias,
                                                        int depth, const float *ahead, const Epilogue &e) {
    if constexpr (kHalves == 3)
        gemm_tile_halves<R>(input, w, bias, depth, ahead, e);
    else
        gemm_tile<R, kHalves / 2>(input, w, bias, depth, ahead, e);
}

template <int N> struct Const {
    static constexpr int value = N;
};

// Calls tile(R, halves), both of them constants: R the most of kTileRows, half of that, half again, ... that there are
// pixels for, `halves` the panel's channels. Returns R. With a tile of every height the extension is half as large
// again, and no image is faster: of AVX-512, rows of 112 and maps of 7 x 7 are multiples of 14 and 7.
template <int R = kTileRows, class Tile> inline int with_tile(std::ptrdiff_t pixels, int channels, const Tile &tile) {
    if constexpr (R > 1) {
        if (pixels < R)
            return with_tile<(R + 1) / 2>(pixels, channels, tile);
    }
    if (const int halves = tile_halves(channels); halves == 2)
        tile(Const<R>(), Const<2>());
    else if (halves == 3)
        tile(Const<R>(), Const<3>());
    else
        tile(Const<R>(), Const<4>());
    return R;
}

// The tile for the first of `pixels` and for the panel's channels; returns how many it took. `bias` may be null, for
// zeros; `ahead` is prefetched.
template <class Input>
inline int gemm_tile(std::ptrdiff_t pixels, const Input &input, const float *w, const float *bias, int depth,
                     const float *ahead, const Epilogue &e) {
    return with_tile(pixels, e.channels, [&](auto rows, auto halves) {
        gemm_tile_of<decltype(rows)::value, decltype(halves)::value>(input, w, bias, depth, ahead, e);
    });
}

inline int min(std::ptrdiff_t a, int b) { return a < b ? static_cast<int>(a) : b; }

} // namespace
} // namespace mnv2::MNV2_ISA
