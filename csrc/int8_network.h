// A frozen int8 network: packed weights and the steps that run them. Immutable once built, and run from any thread.
#pragma once

#include <array>

#include "int8_plan.h"
#include "step_time.h"
#include "workspace.h"

namespace mnv2 {

// The caller's tensors. Strides are in elements; `bytes` images are uint8 and looked up in the network's table.
struct Int8Call {
    const void *x;
    bool bytes;
    std::ptrdiff_t stride_n, stride_c, stride_h, stride_w;
    int n, h, w;
    float *y; // [n, classes]
};

// How the image comes onto the stem's grid.
struct Int8Input {
    std::array<float, 3> scale;
    std::array<std::uint8_t, 3> zero;
    std::vector<std::uint32_t> table; // [3][256]: of a uint8, its place in R, G, B, 0; or empty
};

class Int8Network {
  public:
    // `table`: [3, 256], what each uint8 of each colour is on the grid, or null. Throws std::invalid_argument where the
    // layers are not a stem, inverted residuals, a 1x1 layer and a classifier.
    Int8Network(const KernelTable &kernels, const std::vector<Int8LayerDesc> &layers, const float *input_scale,
                const std::uint8_t *input_zero, const std::uint8_t *table);

    // y = network(x). False, and y worthless, where a value of x is NaN or infinite. Throws std::invalid_argument,
    // std::bad_alloc before any work.
    bool run(const Int8Call &call, int threads) const;

    // The same for one image, in every block of the form `forced` as far as it fits, or of its own where that is null;
    // a value that is no number is an std::invalid_argument here.
    std::vector<StepTime<Int8BlockForm>> time_steps(const Int8Call &call, int threads,
                                                    const Int8BlockForm *forced) const;

    std::size_t workspace_bytes(int n, int h, int w, int threads) const;
    std::pair<std::size_t, std::size_t> kept() const { return {plans_.size(), workspaces_.bytes()}; } // for later calls
    std::size_t weight_bytes() const { return weight_bytes_; }                                        // as packed
    const char *isa() const { return kernels_.isa; }

  private:
    void check(const Int8Call &call, int threads) const;
    bool execute(const Int8Call &call, const Int8Plan &plan, int threads, double *seconds) const;
    std::shared_ptr<const Int8Plan> plan(int h, int w, int threads) const;

    const KernelTable &kernels_;
    std::vector<Int8Layer> layers_;
    std::vector<Int8Step> steps_;
    Int8Input input_;
    Memory weights_;
    std::size_t weight_bytes_ = 0;
    mutable Plans<Int8Plan> plans_;
    mutable Workspaces workspaces_;
};

} // namespace mnv2
