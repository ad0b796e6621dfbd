// 1x1 convolution: a matrix product of pixels and packed weights, with bias, ReLU6 and residual in its epilogue.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

struct PixelRows {
    const float *x;
    std::ptrdiff_t ld;

    // A pointer for three rows: addresses are then base, base + ld and base + 2 ld, and nothing is added between them.
    // An image takes 4.60 ms so, 4.65 with one pointer.
    template <int R> class Walk {
      public:
        explicit Walk(const PixelRows &rows) : ld_(rows.ld) {
#pragma GCC unroll 16
            for (int i = 0; i < kBases; ++i) {
                base_[i] = rows.x + 3 * i * rows.ld;
                keep_in_register(base_[i]);
            }
        }
        const float *at(int r) const { return base_[r / 3] + r % 3 * ld_; }
        Vec pair(int r) const { return broadcast_pair(at(r)); }
        void next() {
#pragma GCC unroll 16
            for (int i = 0; i < kBases; ++i)
                ++base_[i];
        }

      private:
        static constexpr int kBases = (R + 2) / 3;
        const float *base_[kBases];
        std::ptrdiff_t ld_;
    };
};

// Where chunk number `chunk` of the inputs begins: at an even one, since they may go in pairs.
inline int cut(int inputs, int chunk, int chunks) {
    return chunk == chunks ? inputs : static_cast<int>(static_cast<std::int64_t>(inputs) * chunk / chunks) & ~1;
}

// Panels [from, to) for one pixel, several at once: one panel's few sums would wait for each other. Full panels only.
inline int pointwise_pixel(const PointwiseArgs &a, int from, int to) {
    constexpr int kAtOnce = 8 / kTileVecs; // 2 pipes x 4 cycles of latency
    const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(kPanel) * a.cin;
    int panel = from;
    for (; panel + kAtOnce <= to && (panel + kAtOnce) * kPanel <= a.cout; panel += kAtOnce) {
        const float *w = a.weight + panel * size;
        Vec acc[kAtOnce][1][kTileVecs];
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < kTileVecs; ++v)
                acc[i][0][v] = a.bias ? load(a.bias + (panel + i) * kPanel + v * kLanes) : zero();
        for (int k = 0; k < a.cin; ++k, w += kPanel) {
            const Vec x = broadcast(a.x + k);
#pragma GCC unroll 8
            for (int i = 0; i < kAtOnce; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < kTileVecs; ++v)
                    acc[i][0][v] = fma(x, load(w + i * size + v * kLanes), acc[i][0][v]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i)
            finish<1, kTileVecs, float>(acc[i],
                                        {nullptr, 0, a.y + (panel + i) * kPanel, 0, kPanel, a.relu6, a.accumulate});
    }
    return panel;
}

// What the tiles prefetch: a panel's first one the weights after its own, the others in turn what the caller asked for.
struct Ahead {
    const float *asked;
    std::ptrdiff_t left; // elements of it

    const float *take(bool first, const float *next, std::ptrdiff_t size) {
        if (first || left <= 0)
            return next;
        const float *const at = asked;
        asked += size;
        left -= size;
        return at;
    }
};

// The full tiles of a panel whose inputs are one chunk. What a tile needs is made once and moved on from tile to tile:
// made anew for each, it has to come back from memory before the next tile's first load, which few inputs do not hide.
// A core's image takes 3% less on AVX-512 and 8% less on AVX2, where a layer of 16 inputs reaches 84% of the peak, not
// 66%, and one of 32 inputs 90%, not 80%.
template <int kHalves>
inline void full_tiles(const PointwiseArgs &a, int n, const float *w, std::ptrdiff_t size, Ahead &ahead) {
    const float *const bias = a.bias && !a.accumulate ? a.bias + n : nullptr;
    PixelRows x{a.x, a.x_ld};
    Epilogue e{
        a.residual ? a.residual + n : nullptr, a.residual_ld, a.y + n, a.y_ld, a.cout - n, a.relu6, a.accumulate};
    for (std::ptrdiff_t p = 0; p + kTileRows <= a.pixels; p += kTileRows) {
        gemm_tile_of<kTileRows, kHalves>(x, w, bias, a.cin, ahead.take(p == 0, w + size, size), e);
        x.x += kTileRows * a.x_ld;
        e.y += kTileRows * a.y_ld;
        if (e.residual)
            e.residual += kTileRows * a.residual_ld;
    }
}

void pointwise(const PointwiseArgs &a) {
    const int chunks = (a.cin + kChunk - 1) / kChunk;
    int panel = a.panel_begin;
    if (a.pixels == 1 && chunks == 1 && !a.residual)
        panel = pointwise_pixel(a, panel, a.panel_end);
    // Panels outside, pixels inside: the weights of a layer may be larger than L2, its pixels are not.
    Ahead ahead{a.ahead, a.ahead_size};
    for (; panel < a.panel_end; ++panel) {
        const int n = panel * kPanel, width = a.cout - n > kLanes ? kPanel : kLanes;
        const float *const weight = a.weight + static_cast<std::ptrdiff_t>(n) * a.cin;
        std::ptrdiff_t p = 0;
        if (chunks == 1) {
            const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(a.cin) * width;
            // By hand, not as with_tile does: called from a lambda, the loop is slower (an image by 3%).
            const int halves = tile_halves(a.cout - n);
            if (halves == 2)
                full_tiles<2>(a, n, weight, size, ahead);
            else if (halves == 3)
                full_tiles<3>(a, n, weight, size, ahead);
            else
                full_tiles<4>(a, n, weight, size, ahead);
            p = a.pixels / kTileRows * kTileRows;
        }
        for (int rows; p < a.pixels; p += rows) {
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const int begin = cut(a.cin, chunk, chunks), end = cut(a.cin, chunk + 1, chunks);
                const bool last = chunk + 1 == chunks, first = chunk == 0 && !a.accumulate;
                const float *const w = weight + static_cast<std::ptrdiff_t>(begin) * width;
                const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(end - begin) * width;
                const Epilogue e{last && a.residual ? a.residual + p * a.residual_ld + n : nullptr,
                                 a.residual_ld,
                                 a.y + p * a.y_ld + n,
                                 a.y_ld,
                                 a.cout - n,
                                 last && a.relu6,
                                 !first};
                rows = gemm_tile(a.pixels - p, PixelRows{a.x + p * a.x_ld + begin, a.x_ld}, w,
                                 first && a.bias ? a.bias + n : nullptr, end - begin,
                                 ahead.take(p == 0, w + size, size), e);
            }
        }
    }
}

} // namespace
} // namespace mnv2::MNV2_ISA
