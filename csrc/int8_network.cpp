#include "int8_network.h"

#include <algorithm>
#include <stdexcept>

#include "int8_run.h"

namespace mnv2 {

Int8Network::Int8Network(const KernelTable &kernels, const std::vector<Int8LayerDesc> &layers, const float *input_scale,
                         const std::uint8_t *input_zero, const std::uint8_t *table)
    : kernels_(kernels) {
    for (const Int8LayerDesc &d : layers) {
        layers_.push_back({d});
        weight_bytes_ += packed_size(kernels, d);
    }
    steps_ = make_int8_steps(layers_);  // before any weight is read: it looks at the channels
    weights_ = allocate(weight_bytes_); // one block in the order of use
    std::uint8_t *out = reinterpret_cast<std::uint8_t *>(weights_.get());
    for (Int8Layer &layer : layers_) {
        const std::size_t size = packed_size(kernels, layer.desc);
        layer = pack(kernels, layer.desc, out);
        out += size;
    }
    std::copy_n(input_scale, 3, input_.scale.begin());
    std::copy_n(input_zero, 3, input_.zero.begin());
    for (int c = 0; table && c < 3; ++c)
        for (int i = 0; i < 256; ++i)
            input_.table.push_back(static_cast<std::uint32_t>(table[256 * c + i]) << 8 * c);
}

std::shared_ptr<const Int8Plan> Int8Network::plan(int h, int w, int threads) const {
    return plans_.get(h, w, threads, [&] { return make_int8_plan(kernels_, layers_, steps_, h, w, threads); });
}

std::size_t Int8Network::workspace_bytes(int n, int h, int w, int threads) const {
    if (n < 1 || h < 1 || w < 1)
        return 0;
    const Int8Features features(n, layers_.back().desc.cin);
    return arena_bytes(*plan(h, w, usable_threads(threads)), n) + features.size();
}

void Int8Network::check(const Int8Call &call, int threads) const {
    if (threads < 1)
        throw std::invalid_argument("threads must be 1 or more");
    if (call.n < 0 || call.h < 1 || call.w < 1)
        throw std::invalid_argument("H and W must be 1 or more");
    if (call.bytes && input_.table.empty())
        throw std::invalid_argument("uint8 images need the network's normalization");
}

bool Int8Network::run(const Int8Call &call, int threads) const {
    check(call, threads);
    if (call.n == 0)
        return true;
    threads = usable_threads(threads);
    return execute(call, *plan(call.h, call.w, threads), threads, nullptr);
}

std::vector<StepTime<Int8BlockForm>> Int8Network::time_steps(const Int8Call &call, int threads,
                                                             const Int8BlockForm *forced) const {
    check(call, threads);
    if (call.n != 1)
        throw std::invalid_argument("steps are timed for one image");
    threads = usable_threads(threads);
    const Int8Plan plan = make_int8_plan(kernels_, layers_, steps_, call.h, call.w, threads, forced);
    std::vector<double> seconds(steps_.size() + 1);
    if (!execute(call, plan, threads, seconds.data()))
        throw std::invalid_argument("a value of the image is NaN or infinite");
    std::vector<StepTime<Int8BlockForm>> times;
    for (std::size_t i = 0; i < steps_.size(); ++i)
        times.push_back({steps_[i].first(), steps_[i].last, steps_[i].form == Int8Step::Form::block,
                         plan.steps[i].forms.of(threads), seconds[i]});
    const int classifier = static_cast<int>(layers_.size()) - 1;
    times.push_back({classifier, classifier, false, Int8BlockForm::rows, seconds.back()});
    return times;
}

bool Int8Network::execute(const Int8Call &call, const Int8Plan &plan, int threads, double *seconds) const {
    Int8Features features(call.n, layers_.back().desc.cin);
    const std::size_t bytes = arena_bytes(plan, call.n);
    Workspace workspace = workspaces_.take(bytes + features.size());
    std::uint8_t *const arenas = reinterpret_cast<std::uint8_t *>(workspace.memory.get());
    features.data = arenas + bytes;
    const Int8Runner runner(kernels_, layers_, steps_, plan, call, input_, features, seconds);
    parallel(threads, [&](Team &team) { runner.run(team, arenas); });
    workspaces_.give(std::move(workspace));
    return runner.finite();
}

} // namespace mnv2
