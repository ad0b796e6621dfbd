// A frozen network: packed weights and the steps that run them. Immutable once built, and run from any thread.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "layer.h"
#include "pack.h"
#include "plan.h"
#include "step_time.h"
#include "types.h"
#include "workspace.h"

namespace mnv2 {

// Elements of a call's images. uint8 ones are looked up in the network's table.
enum class Element { float32, uint8, bf16 };

// The caller's tensors. Strides are in elements. `x` may be of any where a stem reads it, and else is, as `residual`,
// of the network's activations; so is `y` but for pooled features and logits, which are float32.
struct Call {
    const void *x;
    Element element;
    std::ptrdiff_t stride_n, stride_c, stride_h, stride_w;
    int n, h, w;
    const void *residual; // NHWC, dense, for a network of one pointwise layer
    void *y;              // [n, outputs], or NHWC and dense where the network ends in a convolution
};

class Network {
  public:
    // `pool`: the last pointwise layer is averaged over H and W, as it always is before a linear one. `table`: the 256
    // values of a uint8 for each colour, [3, 256], or null. Throws std::invalid_argument where the layers do not chain.
    Network(const KernelTable &kernels, const std::vector<LayerDesc> &layers, bool pool, const float *table,
            Arithmetic arithmetic);

    // y = network(x). Throws std::invalid_argument, std::bad_alloc before any work.
    void run(const Call &call, int threads) const;

    // The same for one image, in every block of the form `forced` as far as it fits, or of its own where that is null.
    std::vector<StepTime<BlockForm>> time_steps(const Call &call, int threads, const BlockForm *forced) const;

    std::size_t workspace_bytes(int n, int h, int w, int threads) const;
    std::size_t weight_bytes() const { return weight_bytes_; }                                        // as packed
    std::pair<std::size_t, std::size_t> kept() const { return {plans_.size(), workspaces_.bytes()}; } // for later calls
    const char *isa() const { return kernels_.isa; }
    Element activations() const { return arithmetic_ == Arithmetic::bf16 ? Element::bf16 : Element::float32; }

  private:
    void check(const Call &call, int threads) const;
    void execute(const Call &call, const Plan &plan, int threads, double *seconds) const;
    std::shared_ptr<const Plan> plan(int h, int w, int threads) const;

    std::size_t element_bytes() const { return arithmetic_ == Arithmetic::bf16 ? sizeof(bf16) : sizeof(float); }
    std::size_t ring_bytes() const { return arithmetic_ == Arithmetic::bf16 ? kernels_.bf16_ring_bytes : kRingBytes; }

    const KernelTable &kernels_;
    const Arithmetic arithmetic_;
    std::vector<Layer> layers_;
    std::vector<Step> steps_;
    Memory weights_;
    std::size_t weight_bytes_ = 0;
    std::vector<float> table_;

    mutable Plans<Plan> plans_;
    mutable Workspaces workspaces_;
};

} // namespace mnv2
