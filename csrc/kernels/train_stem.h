// The weight's gradient of the stem: a matrix product over pixels whose rows are the taps, read where they lie, and
// whose vectors are output channels. A colour's nine taps at a time.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

constexpr int kStemVecs = kTileRows >= 9 ? 2 : 1; // as many sums as registers hold

template <int Step, int V, class Load>
inline void stem_weight_tile(const StemWeightArgs &a, int colour, int n, const Load &vector) {
    constexpr int kRows = 9;
    const float *const *const lines = a.lines + 3 * colour;
    Vec sums[kRows][V];
#pragma GCC unroll 9
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            sums[r][v] = zero();
    const float *dz = a.dz + n, *above = lines[0], *at = lines[1], *below = lines[2];
    for (std::ptrdiff_t p = 0; p < a.pixels; ++p, dz += a.cout, above += 2 * Step, at += 2 * Step, below += 2 * Step) {
        Vec gradient[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
            gradient[v] = vector.get(dz + v * kLanes);
#pragma GCC unroll 9
        for (int r = 0; r < kRows; ++r) {
            const float *const line = r < 3 ? above : r < 6 ? at : below;
            const Vec x = broadcast(line + r % 3 * Step);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
                sums[r][v] = fma(x, gradient[v], sums[r][v]);
        }
    }
#pragma GCC unroll 9
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float *const dw = a.dw + (kRows * colour + r) * a.cout + n + v * kLanes;
            vector.put(dw, add(vector.get(dw), sums[r][v]));
        }
}

template <int Step> inline void stem_weight(const StemWeightArgs &a) {
    for (int colour = 0; colour < kStemTaps / 9; ++colour) {
        int n = 0;
        for (; n + kStemVecs * kLanes <= a.cout; n += kStemVecs * kLanes)
            stem_weight_tile<Step, kStemVecs>(a, colour, n, WholeVector());
        for (; n < a.cout; n += kLanes)
            stem_weight_tile<Step, 1>(a, colour, n, PartVector{min(a.cout - n, kLanes)});
    }
}

void train_stem_weight(const StemWeightArgs &a) {
    if (a.step == 1)
        stem_weight<1>(a);
    else
        stem_weight<3>(a);
}

} // namespace
} // namespace mnv2::MNV2_ISA
