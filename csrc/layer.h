// One layer of a network: what the caller says of it, and its weights as the kernels read them.
#pragma once

#include "pack.h"

namespace mnv2 {

enum class Kind { stem, depthwise, pointwise, linear };

struct LayerDesc {
    Kind kind;
    int cin;
    int cout;
    int stride;
    bool relu6;
    int residual;        // layers back to the one whose input is added; kGiven: the caller passes it; 0: none
    const float *weight; // folded, in torch's order, of the values that the arithmetic has; read at construction only
    const float *bias;
};
constexpr int kGiven = -1;

// How a network holds its numbers. Sums are float32 in all.
enum class Arithmetic {
    float32,
    bf16,         // weights and activations, multiplied in pairs
    bf16_weights, // float32 activations and products: for processors without an instruction for pairs
};

struct Layer {
    LayerDesc desc;
    Packed packed;
};

} // namespace mnv2
