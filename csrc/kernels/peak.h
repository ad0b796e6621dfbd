// The multiply-add loops that measure the machine's peaks.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// step(acc, a, b): the next value of a chain, of `macs` multiply-accumulates a lane.
template <class Step> double vector_peak(std::int64_t iterations, int macs, const Step &step) {
    constexpr int kChains = 12; // 2 pipes x 5 cycles of latency, and some to spare; 16 registers hold them
    const float factor = 0.999f, term = 1e-3f;
    const Vec f = broadcast(&factor), t = broadcast(&term);
    Vec acc[kChains];
    for (Vec &a : acc)
        a = t;
    for (std::int64_t i = 0; i < iterations; ++i)
        for (Vec &a : acc)
            a = step(a, f, t);
    float out[kLanes];
    volatile float sink = 0.0f; // keeps the loop
    for (Vec &a : acc) {
        store(out, a);
        sink = sink + out[0];
    }
    return static_cast<double>(iterations) * kChains * kLanes * macs;
}

double fma_peak(std::int64_t iterations) {
    return vector_peak(iterations, 1, [](Vec acc, Vec f, Vec t) { return fma(acc, f, t); });
}

#ifdef MNV2_TILES
// product(): four independent products of whole tiles, of `macs` multiply-accumulates each.
template <class Product> double tile_peak(std::int64_t iterations, int macs, const Product &product) {
    constexpr int kProducts = 4, kSlower = 8; // for about the time that the iterations of vectors take
    const Tiles tiles(kTileSize, kTileSize);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (std::int64_t i = 0; i < iterations / kSlower; ++i)
        product();
    return static_cast<double>(iterations / kSlower) * kProducts * macs;
}

double dot2_peak(std::int64_t iterations) {
    return tile_peak(iterations, kTileSize * kTileSize * kTileSize * 2, [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    });
}

double dot4_peak(std::int64_t iterations) {
    return tile_peak(iterations, kTileSize * kTileSize * kTileSize * 4, [] {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    });
}
#else
// Of bf16: by pairs where they are multiplied as they lie, else as float32.
double dot2_peak(std::int64_t iterations) {
    if (!kDot2)
        return fma_peak(iterations);
    return vector_peak(iterations, 2, [](Vec acc, Vec f, Vec t) { return dot2(acc, f, t); });
}

double dot4_peak(std::int64_t iterations) {
    constexpr int kChains = 12;
    std::uint8_t bytes[kLanes * 4];
    for (std::uint8_t &b : bytes)
        b = 1;
    const Unsigned4 u = as_unsigned(load_bytes(bytes));
    const Signed4 s = as_signed(load_bytes(bytes));
    Int acc[kChains];
    for (Int &a : acc)
        a = zero_int();
    for (std::int64_t i = 0; i < iterations; ++i)
        for (Int &a : acc)
            a = dot4(a, u, s);
    std::int32_t out[kLanes];
    volatile std::int32_t sink = 0; // keeps the loop
    for (Int &a : acc) {
        store(out, a);
        sink = sink ^ out[0];
    }
    return static_cast<double>(iterations) * kChains * kLanes * 4;
}
#endif

} // namespace
} // namespace mnv2::MNV2_ISA
