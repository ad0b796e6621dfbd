#include "int8_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mnv2 {
namespace {

// Bytes of L2 that a block's hidden and filtered row groups may fill; 96k to 512k measure alike.
constexpr std::size_t kFusedBytes = 256 * 1024;

// More is no image: planning for it would wrap around.
constexpr std::int64_t kMaxPixels = std::int64_t{1} << 36;

bool is(const std::vector<Int8Layer> &layers, std::size_t i, Kind kind, bool relu6) {
    return i < layers.size() && layers[i].desc.kind == kind && layers[i].desc.relu6 == relu6;
}

void check_chain(const std::vector<Int8Layer> &layers) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const Int8LayerDesc &d = layers[i].desc;
        const bool strides =
            d.kind == Kind::depthwise ? d.stride == 1 || d.stride == 2 : d.stride == (d.kind == Kind::stem ? 2 : 1);
        if (d.cin < 1 || d.cout < 1 || !strides || (i && layers[i - 1].desc.cout != d.cin) ||
            (d.kind == Kind::stem && d.cin != 3) || (d.kind == Kind::depthwise && d.cin != d.cout))
            throw std::invalid_argument("layer " + std::to_string(i) + " does not fit the one before it");
    }
}

std::size_t pixels_size(int h, int w, int channels) {
    return static_cast<std::size_t>(groups(h)) * w * int8_column(channels);
}

constexpr FormRow<Int8BlockForm> kForms[] = {
#define INT8_FORM(threads, groups, form) {threads, groups, Int8BlockForm::form},
#include "int8_forms.def"
#undef INT8_FORM
};

// The forms of a block and the memory they need.
void plan_block(Int8Plan &plan, Int8StepPlan &p, const KernelTable &table, const Int8Layer &produce,
                const Int8Layer &dw, const Int8BlockForm *forced) {
    const int stride = dw.desc.stride, all = groups(p.hidden_h), made = groups(p.ho);
    const std::size_t vector = static_cast<std::size_t>(p.hidden_w) * table.lanes * 4; // of a row group
    const std::size_t filtered = static_cast<std::size_t>(p.wo) * int8_column(dw.desc.cout);
    const bool expands = produce.desc.kind == Kind::pointwise;
    if (expands && 2 * all * vector + made * filtered <= kFusedBytes) {
        p.chunk = made;
        p.kept = std::min(2, dw.vectors);
    } else {
        const std::size_t row = vector * dw.vectors * stride + filtered, fixed = 2 * vector * dw.vectors;
        const std::size_t fits = kFusedBytes > fixed ? (kFusedBytes - fixed) / row : 0;
        p.chunk = static_cast<int>(std::clamp<std::size_t>(fits, 1, made));
        p.kept = dw.vectors;
    }
    p.ring = std::min(all, stride == 1 ? p.chunk + 2 : 2 * p.chunk + 1);
    if (expands)
        p.forms =
            forced ? Forms<Int8BlockForm>{*forced, *forced}
                   : Forms<Int8BlockForm>{look_up(kForms, 1, made), look_up(kForms, plan.threads, made / plan.threads)};
    plan.zeros = std::max(plan.zeros, whole_lines(vector));
    plan.block = std::max(plan.block, whole_lines(p.kept * p.ring * vector) + p.chunk * filtered);
    if (p.forms.has(Int8BlockForm::channels)) {
        plan.filtered = std::max(plan.filtered, made * filtered);
        plan.block = std::max(plan.block, whole_lines(2 * all * vector));
    }
}

} // namespace

std::vector<Int8Step> make_int8_steps(const std::vector<Int8Layer> &layers) {
    const auto fail = [](std::size_t i) {
        throw std::invalid_argument(
            "layer " + std::to_string(i) +
            " is out of place: int8 runs a stem, inverted residuals, a 1x1 layer, a classifier");
    };
    check_chain(layers);
    std::vector<Int8Step> steps;
    std::size_t i = 0;
    while (i + 2 < layers.size()) {
        const bool stem = i == 0;
        if (!is(layers, i, stem ? Kind::stem : Kind::pointwise, true))
            fail(i);
        if (!is(layers, i + 1, Kind::depthwise, true)) {
            if (!stem)
                fail(i + 1);
            steps.push_back({Int8Step::Form::stem, -1, -1, 0});
            ++i;
            continue;
        }
        const int last = static_cast<int>(i) + 2;
        if (!is(layers, last, Kind::pointwise, false))
            fail(last);
        const int residual = layers[last].desc.residual;
        if (residual != 0) {
            const bool fits = residual == 2 && !steps.empty() && steps.back().form == Int8Step::Form::block &&
                              layers[i].desc.cin == layers[last].desc.cout && layers[i + 1].desc.stride == 1;
            if (!fits)
                fail(last);
            steps.back().keep = true;
        }
        steps.push_back({Int8Step::Form::block, static_cast<int>(i), last - 1, last});
        i += 3;
    }
    if (i + 2 != layers.size() || steps.empty() || !is(layers, i, Kind::pointwise, true) ||
        layers[i + 1].desc.kind != Kind::linear)
        fail(i);
    steps.push_back({Int8Step::Form::head, -1, -1, static_cast<int>(i)});
    return steps;
}

Int8Plan make_int8_plan(const KernelTable &table, const std::vector<Int8Layer> &layers,
                        const std::vector<Int8Step> &steps, int h, int w, int threads, const Int8BlockForm *forced) {
    if (static_cast<std::int64_t>(h) * w > kMaxPixels)
        throw std::length_error("an image has more than 2**36 pixels");
    Int8Plan plan;
    plan.h = h;
    plan.w = w;
    plan.threads = threads;
    plan.rows = whole_lines(kInt8StemRows * int8_stem_row(w));
    const auto out_size = [](int size, int stride) { return (size - 1) / stride + 1; };
    for (const Int8Step &s : steps) {
        const Int8LayerDesc &last = layers[s.last].desc;
        Int8StepPlan p{h, w, h, w, out_size(h, last.stride), out_size(w, last.stride)};
        if (s.form == Int8Step::Form::block) {
            const Int8Layer &dw = layers[s.depthwise];
            const int produced = layers[s.produce].desc.stride;
            p.hidden_h = out_size(h, produced);
            p.hidden_w = out_size(w, produced);
            p.ho = out_size(p.hidden_h, dw.desc.stride);
            p.wo = out_size(p.hidden_w, dw.desc.stride);
            plan_block(plan, p, table, layers[s.produce], dw, forced);
            if (s.keep)
                plan.residual = std::max(plan.residual, sizeof(float) * pixels_size(p.ho, p.wo, last.cout));
        }
        if (s.form == Int8Step::Form::head)
            plan.sums = sizeof(std::int64_t) * round_up(last.cout, kChannelPad);
        else
            plan.activation = std::max(plan.activation, pixels_size(p.ho, p.wo, last.cout));
        plan.steps.push_back(p);
        h = p.ho;
        w = p.wo;
    }
    return plan;
}

} // namespace mnv2
