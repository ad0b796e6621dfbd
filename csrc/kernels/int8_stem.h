// The image in int8: its rows onto the network's grid, and the 3x3 stride-2 convolution of them.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// Four bytes are a pixel, R, G, B, 0, so that a tap of all colours is one lane of a dot product.
struct Int8Taps {
    const std::uint8_t *x;
    std::ptrdiff_t row;

    static constexpr int kInner = 3;
    static constexpr std::ptrdiff_t column = 8;
    const std::uint8_t *at(int outer, int r) const { return x + (outer + 2 * r) * row; }
    Int8Taps from(int c) const { return {x + c * column, row}; }
};

// ReLU6 to either layout.
struct Int8StemOutput {
    Int8Scales scales;
    Int8Target y;

    static constexpr bool kFetches = false;
    template <int R> inline __attribute__((always_inline)) void put(const Int (&acc)[R], int vector, int column) const {
        const Bytes packed = pack4(int8_steps(acc, load(scales.scale + vector * kLanes)));
        std::uint8_t *const at = y.y + column * y.column;
        if (y.hidden)
            store(at + vector * y.vector, packed);
        else
            store_pixels(at + vector * kPixelsVector, y.column, packed);
    }
};

void int8_stem(const Int8StemArgs &a) {
    const Int8Taps input{a.rows, a.row};
    const Int8StemOutput output{a.scales, a.y};
    for (int v = 0; v < a.vectors; v += kInt8Vecs) {
        const std::int8_t *const weight = a.weight + static_cast<std::ptrdiff_t>(v) * kInt8StemQuads * kLanes * 4;
        if (v + kInt8Vecs <= a.vectors)
            int8_group<kInt8Vecs>(a.output_rows, input, weight, kInt8StemQuads, *a.ahead, output, v, a.columns);
        else
            int8_group<1>(a.output_rows, input, weight, kInt8StemQuads, *a.ahead, output, v, a.columns);
    }
}

// q = clamp(rne(x * scale) + zero, 0, 255). Clamping x * scale to -zero..255 - zero first is the same: both ends are
// integers.
struct Int8Grid {
    Vec scale, low, high;
    Int zero;

    Int8Grid(float steps, std::uint8_t at) {
        const float first = -static_cast<float>(at), last = 255.0f - static_cast<float>(at);
        std::int32_t zeros[kLanes];
        for (std::int32_t &z : zeros)
            z = at;
        scale = broadcast(&steps);
        low = broadcast(&first);
        high = broadcast(&last);
        zero = load(zeros);
    }
    Int quantize(Vec x) const { return add(to_int(clamp(mul(x, scale), low, high)), zero); }
};

void int8_load(const Int8LoadArgs &a) {
    const Int8Grid red(a.scale[0], a.zero[0]), green(a.scale[1], a.zero[1]), blue(a.scale[2], a.zero[2]);
    const float none = 0.0f;
    const Vec zero_float = broadcast(&none);
    Vec probe = zero_float; // x * 0 is NaN where x is not finite
    float pixels[3][kLanes];
    for (int w = 0; w < a.width; w += kLanes) {
        const int left = min(a.width - w, kLanes);
        Vec x[3];
        for (int c = 0; c < 3; ++c) {
            const float *const from = a.colours[c] + w * a.step;
            if (a.step == 1) {
                x[c] = left == kLanes ? load(from) : load_first(from, left);
                __builtin_prefetch(from + a.ahead);
            } else {
                for (int i = 0; i < kLanes; ++i)
                    pixels[c][i] = i < left ? from[i * a.step] : 0.0f;
                x[c] = load(pixels[c]);
            }
            probe = fma(x[c], zero_float, probe);
        }
        const Int q =
            add(add(red.quantize(x[0]), shift_left<8>(green.quantize(x[1]))), shift_left<16>(blue.quantize(x[2])));
        store(reinterpret_cast<std::int32_t *>(a.y) + w, q);
    }
    float found[kLanes];
    store(found, probe);
    for (float f : found)
        if (!(f == 0.0f))
            *a.finite = false;
}

} // namespace
} // namespace mnv2::MNV2_ISA
