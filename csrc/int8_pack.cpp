#include "int8_layer.h"

#include <cstring>

namespace mnv2 {
namespace {

int quads(const Int8LayerDesc &d) {
    return d.kind == Kind::stem ? kInt8StemQuads : d.kind == Kind::depthwise ? kInt8FilterForms : (d.cin + 3) / 4;
}

int vectors(const KernelTable &table, const Int8LayerDesc &d) { return (d.cout + table.lanes - 1) / table.lanes; }

std::size_t weight_size(const KernelTable &table, const Int8LayerDesc &d) {
    return whole_lines(static_cast<std::size_t>(vectors(table, d)) * quads(d) * table.lanes * 4);
}

// The weight that byte `b` of lane-quad `k` holds for output channel `n`.
std::int8_t weight(const Int8LayerDesc &d, int n, int k, int b) {
    if (d.kind == Kind::stem) { // k: row and column of the tap; b: its colour
        return b < 3 ? d.weight[(static_cast<std::ptrdiff_t>(n) * 3 + b) * 9 + k] : 0;
    }
    if (d.kind == Kind::depthwise) { // k: column, and whether the taps' rows are bytes 0..2 or 1..3
        const int row = b - k % 2;
        return row >= 0 && row < 3 ? d.weight[static_cast<std::ptrdiff_t>(n) * 9 + row * 3 + k / 2] : 0;
    }
    const int c = 4 * k + b;
    return c < d.cin ? d.weight[static_cast<std::ptrdiff_t>(n) * d.cin + c] : 0;
}

} // namespace

std::size_t packed_size(const KernelTable &table, const Int8LayerDesc &d) {
    const std::size_t channels = round_up(d.cout, kChannelPad);
    return weight_size(table, d) + channels * (sizeof(std::int32_t) + 2 * sizeof(float) + 2 * sizeof(std::int16_t));
}

Int8Layer pack(const KernelTable &table, const Int8LayerDesc &d, std::uint8_t *out) {
    std::memset(out, 0, packed_size(table, d));
    const std::size_t channels = round_up(d.cout, kChannelPad);
    std::int8_t *packed = reinterpret_cast<std::int8_t *>(out);
    std::int32_t *const bias = reinterpret_cast<std::int32_t *>(out + weight_size(table, d));
    float *const scale = reinterpret_cast<float *>(bias + channels), *const output_scale = scale + channels;
    std::int16_t *const zero = reinterpret_cast<std::int16_t *>(output_scale + channels);
    Int8Layer layer{d, packed, {bias, scale, output_scale, zero}, quads(d), vectors(table, d)};
    for (int v = 0; v < layer.vectors; ++v)
        for (int k = 0; k < layer.quads; ++k)
            for (int lane = 0; lane < table.lanes; ++lane)
                for (int b = 0; b < 4; ++b, ++packed)
                    if (const int n = v * table.lanes + lane; n < d.cout)
                        *packed = weight(d, n, k, b);
    for (int n = 0; n < d.cout; ++n) {
        bias[n] = d.bias[n];
        scale[n] = d.scale[n];
        if (d.output_scale) {
            output_scale[n] = d.output_scale[n];
            zero[n / 4 * 8 + n % 4] = zero[n / 4 * 8 + 4 + n % 4] = d.zero[n];
        }
    }
    layer.desc.weight = nullptr; // the caller's, gone after this
    layer.desc.bias = nullptr;
    layer.desc.scale = layer.desc.output_scale = nullptr;
    layer.desc.zero = nullptr;
    return layer;
}

} // namespace mnv2
