#include "network.h"

#include <stdexcept>
#include <utility>

#include "parallel.h"
#include "run.h"

namespace mnv2 {
namespace {

int depth(const LayerDesc &d) { return d.kind == Kind::stem ? kStemTaps : d.cin; }

// Whether a layer's weights lie in bf16 pairs. Without an instruction for pairs only the classifier's do, whose every
// weight is read once an image: half the bytes take 2.5% off an image, and widening costs other layers what it gains.
bool in_pairs(const LayerDesc &d, Arithmetic arithmetic) {
    return arithmetic == Arithmetic::bf16 ? d.kind == Kind::pointwise || d.kind == Kind::linear
                                          : arithmetic == Arithmetic::bf16_weights && d.kind == Kind::linear;
}

std::size_t packed_size(const KernelTable &kernels, const LayerDesc &d, Arithmetic arithmetic) {
    return d.kind == Kind::depthwise ? packed_depthwise_size(kernels, d.cin)
                                     : packed_gemm_size(kernels, d.cout, depth(d), in_pairs(d, arithmetic));
}

Packed pack(const KernelTable &kernels, const LayerDesc &d, Arithmetic arithmetic, std::byte *out) {
    const bool pairs = in_pairs(d, arithmetic);
    if (d.kind == Kind::depthwise)
        return pack_depthwise(kernels, d.weight, d.bias, d.cin, out);
    if (d.kind == Kind::linear && !pairs)
        return pack_linear(kernels, d.weight, d.bias, d.cout, d.cin, out);
    return pack_gemm(kernels, d.weight, d.bias, d.cout, depth(d), pairs, out);
}

} // namespace

Network::Network(const KernelTable &kernels, const std::vector<LayerDesc> &layers, bool pool, const float *table,
                 Arithmetic arithmetic)
    : kernels_(kernels), arithmetic_(arithmetic) {
    for (const LayerDesc &d : layers)
        layers_.push_back({d, {}});
    steps_ = make_steps(layers_, pool);
    for (const Layer &layer : layers_)
        weight_bytes_ += packed_size(kernels, layer.desc, arithmetic);
    // One block in the order of use: a kernel that prefetches past its own weights reaches the next layer's (7% of an
    // image on one core, together with the prefetching).
    weights_ = allocate(weight_bytes_);
    std::byte *out = weights_.get();
    for (Layer &layer : layers_) {
        layer.packed = pack(kernels, layer.desc, arithmetic, out);
        out += packed_size(kernels, layer.desc, arithmetic);
        layer.desc.weight = layer.desc.bias = nullptr; // the caller's, gone after this
    }
    if (table)
        table_.assign(table, table + 3 * 256);
}

std::shared_ptr<const Plan> Network::plan(int h, int w, int threads) const {
    return plans_.get(h, w, threads,
                      [&] { return make_plan(layers_, steps_, h, w, threads, element_bytes(), ring_bytes()); });
}

std::size_t Network::workspace_bytes(int n, int h, int w, int threads) const {
    if (n < 1 || h < 1 || w < 1)
        return 0;
    const std::size_t features = sizeof(float) * n * layers_.back().desc.cin;
    return arena_bytes(*plan(h, w, usable_threads(threads)), n) + features;
}

void Network::check(const Call &call, int threads) const {
    if (threads < 1)
        throw std::invalid_argument("threads must be 1 or more");
    if (call.n < 0 || call.h < 1 || call.w < 1)
        throw std::invalid_argument("H and W must be 1 or more");
    if (call.element == Element::uint8 && table_.empty())
        throw std::invalid_argument("uint8 images need the network's normalization");
    if (steps_.front().form == Step::Form::linear && (call.h != 1 || call.w != 1))
        throw std::invalid_argument("a linear layer alone takes pooled features, H = W = 1");
    if (call.element == Element::uint8 && layers_.front().desc.kind != Kind::stem)
        throw std::invalid_argument("uint8 images need a network that begins with a stem");
}

void Network::run(const Call &call, int threads) const {
    check(call, threads);
    if (call.n == 0)
        return;
    threads = usable_threads(threads);
    execute(call, *plan(call.h, call.w, threads), threads, nullptr);
}

std::vector<StepTime<BlockForm>> Network::time_steps(const Call &call, int threads, const BlockForm *forced) const {
    check(call, threads);
    if (call.n != 1)
        throw std::invalid_argument("steps are timed for one image");
    threads = usable_threads(threads);
    const Plan plan = make_plan(layers_, steps_, call.h, call.w, threads, element_bytes(), ring_bytes(), forced);
    std::vector<double> seconds(steps_.size());
    execute(call, plan, threads, seconds.data());
    std::vector<StepTime<BlockForm>> times;
    for (std::size_t i = 0; i < steps_.size(); ++i)
        times.push_back({steps_[i].first(), steps_[i].last, steps_[i].form == Step::Form::block,
                         plan.steps[i].forms.of(threads), seconds[i]});
    if (plan.head_classifies(call.n)) { // then the linear layer ran within the step before it
        times.pop_back();
        times.back().last = steps_.back().last;
    }
    return times;
}

void Network::execute(const Call &call, const Plan &plan, int threads, double *seconds) const {
    const bool classifies = steps_.back().form == Step::Form::linear && steps_.size() > 1;
    const std::size_t features = classifies ? sizeof(float) * call.n * layers_.back().desc.cin : 0;
    const std::size_t bytes = arena_bytes(plan, call.n);
    Workspace own = workspaces_.take(bytes + features);
    std::byte *const memory = own.memory.get();
    void *const pooled = classifies ? memory + bytes : call.y;
    const float *const table = table_.empty() ? nullptr : table_.data();
    const auto run = [&](const auto &runner) {
        parallel(threads, [&](Team &team) { runner.run(team, memory, pooled); });
    };
    if (arithmetic_ == Arithmetic::bf16)
        run(Runner<bf16>(kernels_, layers_, steps_, plan, call, table, seconds));
    else
        run(Runner<float>(kernels_, layers_, steps_, plan, call, table, seconds));
    workspaces_.give(std::move(own));
}

} // namespace mnv2
