// What runs in which order, in which form and in which memory: the steps of a network and their plan for one image
// size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "forms.h"
#include "layer.h"

namespace mnv2 {

// One to three layers that run together. Missing parts are -1.
//   block: [expand | stem] -> depthwise -> project, in one of the forms of BlockForm
//   single: one convolution;  head: pointwise + average pool;  linear
struct Step {
    enum class Form { block, single, head, linear } form;
    int produce = -1; // the layer that makes the hidden tensor: a pointwise one or the stem
    int depthwise = -1;
    int last = -1; // a block's project layer, or the only one

    int first() const { return produce >= 0 ? produce : depthwise >= 0 ? depthwise : last; }
};

// How the threads of a team run a block. All give the same answer.
//   fused:  a strip of output rows each, all three layers of it: one wait, a few hidden rows made twice
//   part:   expanded and filtered by panels of hidden channels, none made twice; then, after a wait, projected
//   layers: expanded, filtered and projected with waits between
// `part` is `fused` where no 1x1 layer expands.
enum class BlockForm { fused, part, layers };

struct StepPlan {
    int h, w;               // of the step's input
    int hidden_h, hidden_w; // of the depthwise layer's input
    int ho, wo;             // of its output
    Forms<BlockForm> forms;
    int rows;          // output rows of a fused block that are projected at a time
    int group;         // output rows that go through the ring at a time
    int ring;          // hidden rows it keeps
    std::size_t rings; // floats of all rings of a thread
};

// Sizes are bytes, whole cache lines. One arena: two activations, the tensors between the layers of a step that threads
// share, and `scratch` for each thread. Hidden tensors are float32 whatever the activations are.
struct Plan {
    int h, w, threads;
    std::vector<StepPlan> steps;
    std::size_t activation = 0;
    std::size_t hidden = 0;
    std::size_t filtered = 0;
    std::size_t sums = 0; // of the pieces of a linear layer that is fused with the head before it; 0: it is not
    std::size_t scratch = 0;

    // Whether the head also classifies its image: with several, the weights are read once for all instead.
    bool head_classifies(int images) const { return sums > 0 && images == 1; }

    std::size_t arena(int threads) const { return 2 * activation + hidden + filtered + sums + threads * scratch; }
};

constexpr int kPoolChunk = 56; // pixels of a head's tile of channels that are summed in float32 at a time

constexpr int kMaxGroup = 28; // of StepPlan::group: an image by bf16 tiles takes 1% longer with 8

// Groups layers into steps. Throws std::invalid_argument where they do not chain.
std::vector<Step> make_steps(const std::vector<Layer> &layers, bool pool);

// `threads`: the most that will share an image; `element`: bytes of an activation; `ring_bytes`: of a panel's hidden
// rows that are made at a time; `forced`: the form of every block, or null for the one that forms.def has. Throws
// std::length_error where the image is too large to plan for.
Plan make_plan(const std::vector<Layer> &layers, const std::vector<Step> &steps, int h, int w, int threads,
               std::size_t element, std::size_t ring_bytes, const BlockForm *forced = nullptr);

// Elements from one pixel to the next in internal tensors.
constexpr int padded(int channels) { return (channels + kChannelPad - 1) / kChannelPad * kChannelPad; }

// Floats of a padded row of stem input: 3 colours, one pixel of zeros at each side.
constexpr std::ptrdiff_t stem_row(int width) {
    return (3 * (static_cast<std::ptrdiff_t>(width) + 2) + kChannelPad - 1) / kChannelPad * kChannelPad;
}
constexpr int kStemRing = 4; // input rows kept, and one of zeros after them

} // namespace mnv2
