// What runs in which order, in which form and in which memory: the steps of a network and their plan for one image
// size.
#pragma once

#include <cstddef>
#include <vector>

#include "types.h"

namespace mnv2 {

enum class Kind { stem, depthwise, pointwise, linear };

// One to three layers that run together. Missing parts are -1.
//   block: [expand | stem] -> depthwise -> project, row by row or layer by layer
//   single: one convolution;  head: pointwise + average pool;  linear
struct Step {
    enum class Form { block, single, head, linear } form;
    int produce = -1; // the layer that makes the hidden tensor: a pointwise one or the stem
    int depthwise = -1;
    int project = -1; // of a block; the only layer of the other forms

    int first() const { return produce >= 0 ? produce : depthwise >= 0 ? depthwise : project; }
};

struct StepPlan {
    int h, w;               // of the step's input
    int hidden_h, hidden_w; // of the depthwise layer's input
    int ho, wo;             // of its output
    int rows;               // output rows a thread makes at a time; ring is sized for them
    int ring;               // hidden rows kept
};

// Sizes are floats. One arena: two activations, the tensors between the layers of a step that threads share, the
// group's input, and `scratch` for each thread.
struct Plan {
    int h, w;
    std::vector<StepPlan> steps;
    int group_from = 0; // steps from here on run for `kGroup` images at once, so that their weights are read once
    std::size_t activation = 0;
    std::size_t hidden = 0;
    std::size_t filtered = 0;
    std::size_t group_input = 0;
    std::size_t scratch = 0;

    std::size_t arena(int threads) const {
        return 2 * activation + hidden + filtered + group_input + threads * scratch;
    }
};

constexpr int kGroup = 4;
constexpr int kPoolChunk = 196; // pixels of a head's tile of channels that are summed at a time

struct Layer;

// Groups layers into steps. Throws std::invalid_argument where they do not chain.
std::vector<Step> make_steps(const std::vector<Layer> &layers, bool pool);

Plan make_plan(const std::vector<Layer> &layers, const std::vector<Step> &steps, int h, int w);

// Floats from one pixel to the next in internal tensors.
constexpr int padded(int channels) { return (channels + kChannelPad - 1) / kChannelPad * kChannelPad; }

// Floats of a padded row of stem input: 3 colours, one pixel of zeros at each side.
constexpr int stem_row(int width) { return padded(3 * (width + 2)); }
constexpr int kStemRing = 4; // input rows kept, and one of zeros after them

} // namespace mnv2
