// The multiply-add loop that measures the machine's peak.
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

} // namespace
} // namespace mnv2::MNV2_ISA
