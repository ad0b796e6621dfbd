// Runs the steps of a network over images, in one thread or a team of them.
#pragma once

#include "network.h"
#include "parallel.h"

namespace mnv2 {

// Where a step reads and writes. `x_ld` and `y_ld` are floats between pixels; `x` is null where the step reads the
// call.
struct Tensors {
    const float *x;
    std::ptrdiff_t x_ld;
    float *y;
    std::ptrdiff_t y_ld;
    int image; // its index in the call
};

// Rows of an NHWC tensor; the last `ring` of them where it keeps no more. Null above the first and below the last.
struct Rows {
    const float *x;
    std::ptrdiff_t ld;
    int height, width;
    int ring;

    const float *at(long row) const { return row < 0 || row >= height ? nullptr : x + row % ring * width * ld; }
};

class Runner {
  public:
    Runner(const KernelTable &kernels, const std::vector<Layer> &layers, const std::vector<Step> &steps,
           const Plan &plan, const Call &call, const float *table)
        : kernels_(kernels), layers_(layers), steps_(steps), plan_(plan), call_(call), table_(table) {}

    // Every image, by one member of a team that all call this with the same memory. Returns when this member is done.
    void run(Team &team, float *memory, float *features) const;

    // Floats of memory for n images: an arena a thread where each has images of its own, or one for all.
    static std::size_t memory(const Plan &plan, int n) {
        const std::size_t alone = n >= plan.threads ? plan.threads * plan.arena(1) : 0;
        const std::size_t together = plan.arena(plan.threads);
        return alone > together ? alone : together;
    }

  private:
    struct Arena {
        float *activation[2];
        float *hidden;
        float *filtered;
        float *scratch;
    };

    Arena arena(float *memory, const Team &team) const;
    void image(Team &team, const Arena &arena, int image, float *features) const;

    Tensors place(int step, const float *x, float *y, int image, float *features) const;
    void run_step(Team &team, const Arena &arena, int step, const Tensors &t) const;
    void block_by_rows(Team &team, const Arena &arena, int step, const Tensors &t) const;
    void block_by_layers(Team &team, const Arena &arena, int step, const Tensors &t) const;
    void single(Team &team, const Arena &arena, int step, const Tensors &t) const;
    void head(Team &team, const Arena &arena, int step, const Tensors &t) const;
    void linear(Team &team, int step, const float *x, int images) const;

    void pointwise(Team &team, const Layer &layer, const Tensors &t, std::ptrdiff_t pixels, const float *residual,
                   std::ptrdiff_t residual_ld) const;
    void pointwise(const Layer &layer, const Tensors &t, std::ptrdiff_t from, std::ptrdiff_t to, const float *residual,
                   std::ptrdiff_t residual_ld, int panel_begin, int panel_end) const;
    int panels(const Layer &layer) const { return blocks(layer, kernels_.panel); }
    void depthwise_row(const Layer &layer, const Rows &in, long row, float *y, std::ptrdiff_t y_ld, int block_begin,
                       int block_end) const;
    void expand_panel(const Layer &layer, const Tensors &t, const Rows &ring, float *out, int from, int to,
                      int panel) const;
    void stem_rows(const Layer &layer, int image, int begin, int end, int width, float *y, std::ptrdiff_t y_ld,
                   float *rows, int &loaded) const;
    void load_row(int image, int row, float *out) const;

    bool planar() const { return !call_.bytes && !(call_.stride_c == 1 && call_.stride_w == 3); }
    int blocks(const Layer &layer) const { return blocks(layer, kernels_.lanes); }
    static int blocks(const Layer &layer, int size) { return (layer.desc.cout + size - 1) / size; }

    const KernelTable &kernels_;
    const std::vector<Layer> &layers_;
    const std::vector<Step> &steps_;
    const Plan &plan_;
    const Call &call_;
    const float *table_;
};

} // namespace mnv2
