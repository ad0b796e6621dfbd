// The 1x1 convolutions on bf16 weights: by tiles where the ISA has them and they fit, by vectors of pairs elsewhere.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

#ifdef MNV2_TILES
// Tiles want many pixels at a time more than they want them in L1: an image takes 1.95 ms so, 2.22 with kRingBytes.
constexpr std::size_t kBf16RingBytes = 100 * 1024;
constexpr int kBf16TileRows = 2 * kTileSize;

template <class Y> void pointwise_by(const Pointwise<bf16, bf16, Y> &a) {
    if (const int depth = tile_depth(a.cin))
        pointwise_tiles(a, depth);
    else
        pointwise_pairs(a);
}
#else
constexpr std::size_t kBf16RingBytes = kRingBytes;
constexpr int kBf16TileRows = kTileRows;

template <class Y> void pointwise_by(const Pointwise<bf16, bf16, Y> &a) { pointwise_pairs(a); }
#endif

void pointwise_bf16(const PointwiseBf16Args &a) { pointwise_by(a); }
void pointwise_bf16_float(const PointwiseBf16FloatArgs &a) { pointwise_by(a); }
void pointwise_mixed(const PointwiseMixedArgs &a) { pointwise_pairs(a); }

} // namespace
} // namespace mnv2::MNV2_ISA
