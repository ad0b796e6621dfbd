// What an int8 network runs in which order, in which form and in which memory.
#pragma once

#include <vector>

#include "forms.h"
#include "int8_layer.h"

namespace mnv2 {

// One to three layers that run together, all but the classifier, which is the network's last layer.
//   stem: alone;  block: [expand | stem] -> depthwise -> project;  head: 1x1 + average pool
struct Int8Step {
    enum class Form { stem, block, head } form;
    int produce = -1; // of a block, the layer that makes the hidden tensor
    int depthwise = -1;
    int last = -1;
    bool keep = false; // the float32 values of its output are added later

    int first() const { return form == Form::block ? produce : last; }
};

// How the threads of a team run a block. Both give the same answer.
//   rows:     a strip of output row groups each, all three layers of it: one wait, a few hidden rows made twice
//   channels: a share of the hidden channels each, none made twice; then, after a wait, a share of the output. The
//             filtered tensor goes from core to core
// `channels` is `rows` where the stem makes the hidden tensor.
enum class Int8BlockForm { rows, channels };

struct Int8StepPlan {
    int h, w;               // of the step's input
    int hidden_h, hidden_w; // of the depthwise layer's input
    int ho, wo;             // of its output
    int chunk = 0;          // output row groups a thread makes at a time
    int ring = 0;           // hidden row groups kept for them
    int kept = 0;           // hidden vectors kept: two where a chunk is the whole image, all elsewhere
    Forms<Int8BlockForm> forms{Int8BlockForm::rows, Int8BlockForm::rows};
};

// Sizes are bytes, whole cache lines. One arena: two activations, float32 values for residuals, the tensor between the
// layers of a block that threads share, and `scratch` for each thread.
struct Int8Plan {
    int h, w, threads;
    std::vector<Int8StepPlan> steps;
    std::size_t activation = 0;
    std::size_t residual = 0;
    std::size_t filtered = 0;
    // Of each thread: input rows, a group of zeros, sums of the head, hidden and filtered row groups.
    std::size_t rows = 0, zeros = 0, sums = 0, block = 0;

    std::size_t scratch() const { return rows + zeros + sums + block; }
    std::size_t arena(int threads) const { return 2 * activation + residual + filtered + threads * scratch(); }
};

constexpr int groups(int rows) { return (rows + kGroup - 1) / kGroup; }

// Bytes from a column to the next in the pixels layout, and from an input row of the stem to the next: a pixel of
// padding at each side, and room for whole vectors.
constexpr std::ptrdiff_t int8_column(int channels) {
    return static_cast<std::ptrdiff_t>(kGroup) * round_up(channels, kChannelPad);
}
constexpr std::ptrdiff_t int8_stem_row(int width) {
    return (4 * (static_cast<std::ptrdiff_t>(width) + 2 + kChannelPad) + 63) / 64 * 64;
}

// Steps of a pooled feature to one of a uint8: the power of two that fits the classifier's int32.
constexpr int feature_steps(int channels) {
    int steps = 32;
    while (steps > 1 && std::int64_t{255} * 127 * steps * channels > std::int64_t{1} << 30)
        steps /= 2;
    return steps;
}

// Groups layers into steps. Throws std::invalid_argument where they are not stem, blocks, 1x1 layer and classifier.
std::vector<Int8Step> make_int8_steps(const std::vector<Int8Layer> &layers);

// `threads`: the most that will share an image; `forced`: the form of every block, or null for the one that
// int8_forms.def has. Throws std::length_error where the image is too large to plan for.
Int8Plan make_int8_plan(const KernelTable &table, const std::vector<Int8Layer> &layers,
                        const std::vector<Int8Step> &steps, int h, int w, int threads,
                        const Int8BlockForm *forced = nullptr);

} // namespace mnv2
