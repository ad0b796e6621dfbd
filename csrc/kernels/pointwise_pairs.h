// 1x1 convolution on bfloat16 weights in pairs of inputs: [cout / panel][cin / 2][panel][2].
//
// Pixels are bf16, two inputs a lane and one instruction for both where the ISA has it, or float32, with the weights
// widened as they are loaded. Sums are float32, and in one order whatever the tile's size.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// R pixels, `ld` elements apart. `step` multiplies the next pair of inputs with vectors of weights, `last` the input
// that an odd count leaves over: it reads no memory after it, and its partner's weights are zero.
template <int R> struct Bf16Pixels {
    const bf16 *x;
    std::ptrdiff_t ld;

    struct Weights {
        Vec pairs;
    };
    static Weights weights(const bf16 *w) { return {load_pairs(w)}; }
    struct Input {
        Vec pair;
    };
    Input input(int r) const { return {broadcast_pair(x + r * ld)}; }
    Input last_input(int r) const { return {broadcast_single(x + r * ld)}; }
    static Input join(const Input &a, const Input &b) { return {MNV2_ISA::join(a.pair, b.pair)}; }
    static Vec step(Vec acc, const Input &x, const Weights &w) { return dot2(acc, x.pair, w.pairs); }
};

template <int R> struct FloatPixels {
    const float *x;
    std::ptrdiff_t ld;

    struct Weights {
        Vec first, second;
    };
    static Weights weights(const bf16 *w) {
        const Vec pairs = load_pairs(w);
        return {firsts(pairs), seconds(pairs)};
    }
    struct Input {
        Vec first, second;
    };
    Input input(int r) const { return {broadcast(x + r * ld), broadcast(x + r * ld + 1)}; }
    Input last_input(int r) const { return {broadcast(x + r * ld), zero()}; }
    static Input join(const Input &a, const Input &b) {
        return {MNV2_ISA::join(a.first, b.first), MNV2_ISA::join(a.second, b.second)};
    }
    static Vec step(Vec acc, const Input &x, const Weights &w) {
        return fma(x.second, w.second, fma(x.first, w.first, acc));
    }
};

template <int R> Bf16Pixels<R> pixels_of(const bf16 *x, std::ptrdiff_t ld) { return {x, ld}; }
template <int R> FloatPixels<R> pixels_of(const float *x, std::ptrdiff_t ld) { return {x, ld}; }

template <int V> inline void prefetch_pairs(const bf16 *w, int pairs) {
    prefetch_panel<V>(reinterpret_cast<const float *>(w) + V * kLanes * pairs);
}

template <int R, int V, class X, class Y>
inline void pairs_tile(const X *x, std::ptrdiff_t ld, const bf16 *w, const float *bias, int depth,
                       const EpilogueTo<Y> &e) {
    auto pixels = pixels_of<R>(x, ld);
    using Pixels = decltype(pixels);
    const int pairs = depth / 2;
    Vec acc[R][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const Vec b = bias ? load(bias + v * kLanes) : zero();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            acc[r][v] = b;
    }
    const auto step = [&](auto input) __attribute__((always_inline)) {
        typename Pixels::Weights wk[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            wk[v] = Pixels::weights(w + 2 * v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto xr = input(r);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[r][v] = Pixels::step(acc[r][v], xr, wk[v]);
        }
    };
    for (int k = 0; k < pairs; ++k, w += 2 * V * kLanes, pixels.x += 2) {
        prefetch_pairs<V>(w, pairs);
        step([&](int r) __attribute__((always_inline)) { return pixels.input(r); });
    }
    if (depth % 2)
        step([&](int r) __attribute__((always_inline)) { return pixels.last_input(r); });
    finish<R, V>(acc, e);
}

// R pixels x one vector and a half, as gemm_tile_halves.
template <int R, class X, class Y>
inline void pairs_tile_halves(const X *x, std::ptrdiff_t ld, const bf16 *w, const float *bias, int depth,
                              const EpilogueTo<Y> &e) {
    constexpr int kPairs = (R + 1) / 2;
    auto pixels = pixels_of<R>(x, ld);
    using Pixels = decltype(pixels);
    const int pairs = depth / 2;
    Vec low[R][1], high[kPairs];
    const Vec bias_low = bias ? load(bias) : zero(), bias_high = bias ? load(bias + kLanes) : zero();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        low[r][0] = bias_low;
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i)
        high[i] = bias_high;
    const auto step = [&](auto input) __attribute__((always_inline)) {
        const auto w_low = Pixels::weights(w), w_high = Pixels::weights(w + 2 * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kPairs; ++i) {
            const int r = 2 * i;
            const auto x0 = input(r);
            low[r][0] = Pixels::step(low[r][0], x0, w_low);
            if (r + 1 < R) {
                const auto x1 = input(r + 1);
                low[r + 1][0] = Pixels::step(low[r + 1][0], x1, w_low);
                high[i] = Pixels::step(high[i], Pixels::join(x0, x1), w_high);
            } else {
                high[i] = Pixels::step(high[i], x0, w_high);
            }
        }
    };
    for (int k = 0; k < pairs; ++k, w += 2 * kPanel, pixels.x += 2) {
        prefetch_pairs<kTileVecs>(w, pairs);
        step([&](int r) __attribute__((always_inline)) { return pixels.input(r); });
    }
    if (depth % 2)
        step([&](int r) __attribute__((always_inline)) { return pixels.last_input(r); });
    finish<R, 1>(low, e);
    finish_halves<R>(high, e);
}

// The tile of that width.
template <int R, int kHalves, class X, class Y>
inline void pairs_tile_of(const X *x, std::ptrdiff_t ld, const bf16 *w, const float *bias, int depth,
                          const EpilogueTo<Y> &e) {
    if constexpr (kHalves == 3)
        pairs_tile_halves<R>(x, ld, w, bias, depth, e);
    else
        pairs_tile<R, kHalves / 2>(x, ld, w, bias, depth, e);
}

template <class X, class Y> void pointwise_pairs(const Pointwise<X, bf16, Y> &a) {
    const std::ptrdiff_t depth = (a.cin + 1) / 2 * 2;
    for (int panel = a.panel_begin; panel < a.panel_end; ++panel) {
        const int n = panel * kPanel;
        for (std::ptrdiff_t p = 0; p < a.pixels;) {
            const EpilogueTo<Y> e{a.residual ? a.residual + p * a.residual_ld + n : nullptr,
                                  a.residual_ld,
                                  a.y + p * a.y_ld + n,
                                  a.y_ld,
                                  a.cout - n,
                                  a.relu6,
                                  false};
            p += with_tile(a.pixels - p, e.channels, [&](auto rows, auto halves) {
                pairs_tile_of<decltype(rows)::value, decltype(halves)::value>(
                    a.x + p * a.x_ld, a.x_ld, a.weight + n * depth, a.bias ? a.bias + n : nullptr, a.cin, e);
            });
        }
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
