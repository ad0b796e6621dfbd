// What runs in which order, in which form and in which memory: the steps of a network and their plan for one image
// size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layer.h"

namespace mnv2 {

// One to three layers that run together. Missing parts are -1.
//   block: [expand | stem] -> depthwise -> project, row by row or layer by layer
//   single: one convolution;  head: pointwise + average pool;  linear
struct Step {
    enum class Form { block, single, head, linear } form;
    int produce = -1; // the layer that makes the hidden tensor: a pointwise one or the stem
    int depthwise = -1;
    int last = -1; // a block's project layer, or the only one

    int first() const { return produce >= 0 ? produce : depthwise >= 0 ? depthwise : last; }
};

struct StepPlan {
    int h, w;               // of the step's input
    int hidden_h, hidden_w; // of the depthwise layer's input
    int ho, wo;             // of its output
    int rows;               // output rows a thread makes at a time; ring is sized for them
    int ring;               // hidden rows kept
};

// Sizes are bytes, whole cache lines. One arena: two activations, the tensors between the layers of a step that threads
// share, and `scratch` for each thread. Hidden tensors are float32 whatever the activations are.
struct Plan {
    int h, w, threads;
    std::vector<StepPlan> steps;
    std::size_t activation = 0;
    std::size_t hidden = 0;
    std::size_t filtered = 0;
    std::size_t scratch = 0;

    std::size_t arena(int threads) const { return 2 * activation + hidden + filtered + threads * scratch; }
};

// Bytes of memory for n images: an arena a thread where each has images of its own, or one for all.
inline std::size_t workspace(const Plan &plan, int n) {
    const std::size_t alone = n >= plan.threads ? plan.threads * plan.arena(1) : 0;
    const std::size_t together = plan.arena(plan.threads);
    return alone > together ? alone : together;
}

constexpr int kPoolChunk = 56; // pixels of a head's tile of channels that are summed in float32 at a time

// Whether a block runs layer by layer, which shares every row once among `threads` and needs two more waits, or row by
// row, which keeps the hidden rows in L2 and makes a few of them twice. Large maps want the second, small ones the
// first. More threads never turn a yes into a no.
bool by_layers(const std::vector<Layer> &layers, const Step &s, const StepPlan &p, int threads);

// Groups layers into steps. Throws std::invalid_argument where they do not chain.
std::vector<Step> make_steps(const std::vector<Layer> &layers, bool pool);

// `threads`: the most that will share an image; `element`: bytes of an activation. Throws std::length_error where the
// image is too large to plan for.
Plan make_plan(const std::vector<Layer> &layers, const std::vector<Step> &steps, int h, int w, int threads,
               std::size_t element);

// Elements from one pixel to the next in internal tensors.
constexpr int padded(int channels) { return (channels + kChannelPad - 1) / kChannelPad * kChannelPad; }

// Floats of a padded row of stem input: 3 colours, one pixel of zeros at each side.
constexpr std::ptrdiff_t stem_row(int width) {
    return (3 * (static_cast<std::ptrdiff_t>(width) + 2) + kChannelPad - 1) / kChannelPad * kChannelPad;
}
constexpr int kStemRing = 4; // input rows kept, and one of zeros after them

} // namespace mnv2
