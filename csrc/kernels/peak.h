// The multiply-add loops that measure the machine's peaks.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

double fma_peak(std::int64_t iterations) {
    constexpr int kChains = 12; // 2 pipes x 5 cycles of latency, and some to spare; 16 registers hold them
    const float factor = 0.999f, term = 1e-3f;
    const Vec f = broadcast(&factor), t = broadcast(&term);
    Vec acc[kChains];
    for (Vec &a : acc)
        a = t;
    for (std::int64_t i = 0; i < iterations; ++i)
        for (Vec &a : acc)
            a = fma(a, f, t);
    float out[kLanes];
    volatile float sink = 0.0f; // keeps the loop
    for (Vec &a : acc) {
        store(out, a);
        sink = sink + out[0];
    }
    return static_cast<double>(iterations) * kChains * kLanes;
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

} // namespace
} // namespace mnv2::MNV2_ISA
