// One layer of an int8 network: what the caller says of it, and its tensors as the kernels read them.
#pragma once

#include "layer.h"

namespace mnv2 {

struct Int8LayerDesc {
    Kind kind;
    int cin;
    int cout;
    int stride;
    bool relu6;
    int residual;              // layers back to the one whose input is added, or 0
    const std::int8_t *weight; // in torch's order; these five are read at construction only
    const std::int32_t *bias;
    const float *scale;
    const float *output_scale; // of a convolution without ReLU6, null elsewhere, as is
    const std::uint8_t *zero;
};

struct Int8Layer {
    Int8LayerDesc desc;
    const std::int8_t *weight = nullptr;
    Int8Scales scales{};
    int quads = 0;   // of its inputs: four products each
    int vectors = 0; // of its outputs
};

// Bytes of a packed layer, a multiple of a cache line.
std::size_t packed_size(const KernelTable &table, const Int8LayerDesc &d);

// Lays a layer out at `out`, packed_size bytes. Missing channels have zeros everywhere.
Int8Layer pack(const KernelTable &table, const Int8LayerDesc &d, std::uint8_t *out);

} // namespace mnv2
