// The register tile that the pointwise convolution and the stem share: R pixels x V vectors of output channels.
//
// Included once per ISA, inside that ISA's namespace. Each output is bias + x0*w0 + x1*w1 + ... in this order whatever
// the tile's size, so that an answer does not depend on the batch, the threads or the position in the image.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kPanel = kTileVecs * kLanes;
static_assert(kTileVecs == 2, "a panel is two vectors wide, or one where one is enough");

struct Epilogue {
    const float *residual;
    std::ptrdiff_t residual_ld;
    float *y;
    std::ptrdiff_t y_ld;
    int channels; // that may be written from y on
    bool relu6;
};

// The loops over R and V are unrolled by name: left to itself the compiler keeps the accumulators in memory around the
// epilogue (16 inputs: 66 GMAC/s instead of 105 on a core whose peak is 129).
template <int R, int V> inline void finish(Vec (&acc)[R][V], const Epilogue &e) {
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
        float *const y = e.y + v * kLanes;
        const float *const residual = e.residual + v * kLanes;
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

// Input::at(r, k) is the address of pixel r's k-th input.
template <int R, int V, class Input>
inline void gemm_tile(const Input &input, const float *w, const float *bias, int depth, const Epilogue &e) {
    Vec acc[R][V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const Vec b = load(bias + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            acc[r][v] = b;
    }
    for (int k = 0; k < depth; ++k, w += V * kLanes) {
        Vec wk[V];
        // The next panel, or the next layer, into L2: weights that come from L3 cost 7% of an image otherwise.
#pragma GCC unroll 2
        for (int i = 0; i < V * kLanes; i += 16)
            __builtin_prefetch(w + V * kLanes * depth + i, 0, 2);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            wk[v] = load(w + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = broadcast(input.at(r, k));
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                acc[r][v] = fma(x, wk[v], acc[r][v]);
        }
    }
    finish<R, V>(acc, e);
}

// Calls tile<rows, vecs> for run-time counts 1..kTileRows, 1..kTileVecs.
template <class Input, int R = kTileRows>
inline void gemm_tile(int rows, int vecs, const Input &input, const float *w, const float *bias, int depth,
                      const Epilogue &e) {
    if constexpr (R > 0) {
        if (rows < R)
            gemm_tile<Input, R - 1>(rows, vecs, input, w, bias, depth, e);
        else if (vecs == kTileVecs)
            gemm_tile<R, kTileVecs>(input, w, bias, depth, e);
        else
            gemm_tile<R, 1>(input, w, bias, depth, e);
    }
}

// Vectors that the panel from channel `begin` on needs.
inline int panel_vecs(int cout, int begin) { return cout - begin > kLanes ? kTileVecs : 1; }

inline int min(std::ptrdiff_t a, int b) { return a < b ? static_cast<int>(a) : b; }

} // namespace
} // namespace mnv2::MNV2_ISA
