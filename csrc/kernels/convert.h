// Between float32 and bfloat16.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

template <class X, class Y> void convert(const Convert<X, Y> &a) {
    for (std::ptrdiff_t p = 0; p < a.pixels; ++p) {
        const X *const x = a.x + p * a.x_ld;
        Y *const y = a.y + p * a.y_ld;
        int c = 0;
        for (; c + kLanes <= a.channels; c += kLanes)
            store(y + c, load(x + c));
        if (c < a.channels)
            store_first(y + c, load_first(x + c, a.channels - c), a.channels - c);
    }
}

void widen(const WidenArgs &a) { convert(a); }
void narrow(const NarrowArgs &a) { convert(a); }

} // namespace
} // namespace mnv2::MNV2_ISA
