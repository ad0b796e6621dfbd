// The first layer, 3x3 stride 2 from three colours: a matrix product over 27 taps, read where they lie.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

template <int Step> struct Taps {
    const float *const *taps;
    std::ptrdiff_t offset;

    template <int R> class Walk {
      public:
        explicit Walk(const Taps &t) : tap_(t.taps), offset_(t.offset) {}
        const float *at(int r) const { return *tap_ + offset_ + r * Step; }
        Vec pair(int r) const { return alternate(broadcast(at(r)), broadcast(tap_[1] + offset_ + r * Step)); }
        void next() { ++tap_; }

      private:
        const float *const *tap_;
        std::ptrdiff_t offset_;
    };
};

template <int Step> void stem(const StemArgs &a) {
    for (int n = 0; n < a.cout; n += kPanel) {
        const float *const w = a.weight + static_cast<std::ptrdiff_t>(n) * kStemTaps;
        const float *const bias = a.bias ? a.bias + n : nullptr;
        for (std::ptrdiff_t p = 0; p < a.pixels;) {
            const Epilogue e{nullptr, 0, a.y + p * a.y_ld + n, a.y_ld, a.cout - n, a.relu6, false};
            p += gemm_tile(a.pixels - p, Taps<Step>{a.taps, p * Step}, w, bias, kStemTaps, w, e);
        }
    }
}

void stem(const StemArgs &a) {
    if (a.step == 2)
        stem<2>(a);
    else
        stem<6>(a);
}

} // namespace
} // namespace mnv2::MNV2_ISA
