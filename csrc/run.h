// Runs the steps of a network over images, in one thread or a team of them.
#pragma once

#include <type_traits>

#include "network.h"
#include "parallel.h"
#include "step_time.h"

namespace mnv2 {

// Where a layer or a step reads and writes. `x_ld` and `y_ld` are elements between pixels; `x` is null where a step
// reads the call.
template <class X, class Y> struct Tensors {
    const X *x;
    std::ptrdiff_t x_ld;
    Y *y;
    std::ptrdiff_t y_ld;
    int image; // its index in the call
};

// Rows of a hidden tensor; the last `ring` of them where it keeps no more. Null above the first and below the last.
struct Rows {
    const float *x;
    std::ptrdiff_t ld;
    int height, width;
    int ring;

    const float *at(long row) const { return row < 0 || row >= height ? nullptr : x + row % ring * width * ld; }
};

// T: the element of activations between steps. What lies within a step before its depthwise filter is float32.
// run.cpp has the walk over images and steps, run_block.cpp the convolutions, run_ends.cpp the stem,
// the head and the classifier.
template <class T> class Runner {
  public:
    Runner(const KernelTable &kernels, const std::vector<Layer> &layers, const std::vector<Step> &steps,
           const Plan &plan, const Call &call, const float *table, double *seconds = nullptr)
        : kernels_(kernels), layers_(layers), steps_(steps), plan_(plan), call_(call), table_(table),
          seconds_(seconds) {}

    // Every image, by one member of a team that all call this with the same memory. Returns when this member is done.
    // `features`: room for the pooled ones of every image, T where a linear layer follows and else float32.
    void run(Team &team, std::byte *memory, void *features) const;

  private:
    static constexpr bool kFloat = std::is_same_v<T, float>;

    using Ends = Tensors<T, T>; // of a step

    // What will be read soon, to be prefetched.
    struct Ahead {
        const float *begin;
        std::ptrdiff_t size;
    };

    struct Arena {
        T *activation[2];
        float *hidden;
        T *filtered;
        float *sums;
        std::byte *scratch;
    };

    Arena arena(std::byte *memory, const Team &team) const;
    void image(Team &team, const Arena &arena, int image, void *features) const;

    Ends place(int step, const T *x, T *y, int image) const;
    void run_step(Team &team, const Arena &arena, int step, const Ends &t, void *features) const;
    struct Block;
    Block place_block(const Arena &arena, int step) const;
    void block(Team &team, const Arena &arena, int step, const Ends &t) const;
    void fused(Team &team, const Block &b, const Ends &t) const;
    void part_fused(Team &team, const Arena &arena, const Block &b, const Ends &t) const;
    void by_layers(Team &team, const Arena &arena, const Block &b, const Ends &t) const;
    int filter_panel(const Block &b, const Ends &t, int channel, int begin, int end, int made, float *ring, int &loaded,
                     T *out) const;
    void single(Team &team, const Arena &arena, int step, const Ends &t) const;
    void head(Team &team, const Arena &arena, int step, const Ends &t, void *features) const;
    void linear(Team &team, int step, const T *x, int images) const;
    void piece(const Layer &layer, int piece, const float *x, std::ptrdiff_t images, float *y, std::ptrdiff_t y_ld,
               bool accumulate, int panel_begin, int panel_end) const;
    void add_pieces(Team &team, const Layer &layer, const float *sums) const;

    template <class X, class Y>
    void pointwise(Team &team, const Layer &layer, const Tensors<X, Y> &t, std::ptrdiff_t pixels, const Y *residual,
                   std::ptrdiff_t residual_ld) const;
    template <class X, class Y>
    void pointwise(const Layer &layer, const Tensors<X, Y> &t, std::ptrdiff_t from, std::ptrdiff_t to,
                   const Y *residual, std::ptrdiff_t residual_ld, int panel_begin, int panel_end) const;
    template <class X, class Y>
    void multiply(const Layer &layer, int n, int cout, const Tensors<X, Y> &t, std::ptrdiff_t pixels, const Y *residual,
                  std::ptrdiff_t residual_ld, int panel_begin, int panel_end, const Ahead &ahead = {nullptr, 0}) const;
    int panels(const Layer &layer) const { return (layer.desc.cout + kernels_.panel - 1) / kernels_.panel; }
    void depthwise(const Layer &layer, const Rows &in, long begin, long end, T *y, std::ptrdiff_t y_ld, int channel,
                   int channels) const;
    void expand_panel(const Block &b, const Ends &t, const Rows &hidden, float *ring, int channel, int from,
                      int to) const;
    void stem_rows(const Layer &layer, int image, int begin, int end, int width, float *y, std::ptrdiff_t y_ld,
                   float *rows, int &loaded) const;
    void load_row(int image, int row, float *out) const;
    template <class X> void load_row(const X *x, float *out) const;
    void widen_rows(const Ends &t, const Rows &ring, float *out, int channel, int from, int to, int channels) const;

    bool planar() const { return call_.element != Element::uint8 && !(call_.stride_c == 1 && call_.stride_w == 3); }

    const KernelTable &kernels_;
    const std::vector<Layer> &layers_;
    const std::vector<Step> &steps_;
    const Plan &plan_;
    const Call &call_;
    const float *table_;
    double *const seconds_; // of each step for the last image, where the caller asks
};

} // namespace mnv2
