#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "pack.h"

namespace mnv2 {
namespace {

// Bytes of L2 (1 MB) that a row-by-row block may fill with hidden and filtered rows; the rest is for weights and
// pixels. 128k to 384k measure alike, 640k costs 4% of an image.
constexpr std::size_t kFusedBytes = 192 * 1024;

// More is no image: planning for it would wrap around.
constexpr std::int64_t kMaxPixels = std::int64_t{1} << 36;

bool is(const std::vector<Layer> &layers, std::size_t i, Kind kind) {
    return i < layers.size() && layers[i].desc.kind == kind;
}

void check_chain(const std::vector<Layer> &layers) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const LayerDesc &d = layers[i].desc;
        const std::string where = "layer " + std::to_string(i) + ": ";
        if (d.cin < 1 || d.cout < 1 || d.stride < 1 || d.stride > 2)
            throw std::invalid_argument(where + "channels and stride must be positive, stride 1 or 2");
        if (i && layers[i - 1].desc.cout != d.cin)
            throw std::invalid_argument(where + "takes " + std::to_string(d.cin) + " channels but gets " +
                                        std::to_string(layers[i - 1].desc.cout));
        if (d.kind == Kind::stem && (i || d.cin != 3 || d.stride != 2))
            throw std::invalid_argument(where + "a stem is the first layer, of 3 channels and stride 2");
        if (d.kind == Kind::depthwise && d.cin != d.cout)
            throw std::invalid_argument(where + "a depthwise layer keeps its channels");
        if ((d.kind == Kind::pointwise || d.kind == Kind::linear) && d.stride != 1)
            throw std::invalid_argument(where + "has stride 1 only");
        if (d.kind == Kind::linear && i + 1 != layers.size())
            throw std::invalid_argument(where + "a linear layer is the last one");
    }
}

// A block of which only the project layer may add its own input, which is the hidden tensor's source.
bool residual_fits(const std::vector<Layer> &layers, const Step &s) {
    const LayerDesc &first = layers[s.first()].desc, &last = layers[s.last].desc;
    if (last.residual == 0)
        return true;
    return last.residual == s.last - s.first() && first.kind != Kind::stem && first.cin == last.cout &&
           layers[s.depthwise].desc.stride == 1;
}

} // namespace

std::vector<Step> make_steps(const std::vector<Layer> &layers, bool pool) {
    if (layers.empty())
        throw std::invalid_argument("a network needs at least one layer");
    check_chain(layers);
    std::vector<Step> steps;
    for (std::size_t i = 0; i < layers.size();) {
        Step s{Step::Form::single, -1, -1, -1};
        const bool produces = is(layers, i, Kind::stem) || is(layers, i, Kind::pointwise);
        const std::size_t dw = i + (produces ? 1 : 0);
        const bool pooled = pool && dw + 2 == layers.size(); // then the pointwise layer is a head
        if (is(layers, dw, Kind::depthwise) && is(layers, dw + 1, Kind::pointwise) && !pooled) {
            s = {Step::Form::block, produces ? static_cast<int>(i) : -1, static_cast<int>(dw),
                 static_cast<int>(dw) + 1};
            if (residual_fits(layers, s)) {
                steps.push_back(s);
                i = dw + 2;
                continue;
            }
        }
        const bool last = i + 1 == layers.size();
        s = {Step::Form::single, -1, -1, static_cast<int>(i)};
        if (is(layers, i, Kind::linear))
            s.form = Step::Form::linear;
        else if (is(layers, i, Kind::pointwise) && (is(layers, i + 1, Kind::linear) || (last && pool)))
            s.form = Step::Form::head;
        const int residual = layers[i].desc.residual;
        if (residual != 0 && !(residual == kGiven && layers.size() == 1 && is(layers, i, Kind::pointwise)))
            throw std::invalid_argument("layer " + std::to_string(i) + ": its residual has no block to come from");
        steps.push_back(s);
        ++i;
    }
    if (steps.back().form == Step::Form::linear && steps.size() > 1 && steps[steps.size() - 2].form != Step::Form::head)
        throw std::invalid_argument("a linear layer follows a pointwise one");
    if (pool && steps.back().form != Step::Form::head && steps.back().form != Step::Form::linear)
        throw std::invalid_argument("only a pointwise layer can be pooled");
    return steps;
}

bool by_layers(const std::vector<Layer> &layers, const Step &s, const StepPlan &p, int threads) {
    const bool expands =
        s.form == Step::Form::block && s.produce >= 0 && layers[s.produce].desc.kind == Kind::pointwise;
    return expands && threads > 1 && p.rows >= p.ho / threads;
}

Plan make_plan(const std::vector<Layer> &layers, const std::vector<Step> &steps, int h, int w, int threads,
               std::size_t element) {
    if (static_cast<std::int64_t>(h) * w > kMaxPixels)
        throw std::length_error("an image has more than 2**36 pixels");
    Plan plan;
    plan.h = h;
    plan.w = w;
    plan.threads = threads;
    const auto out_size = [](int size, int stride) { return (size - 1) / stride + 1; };
    for (const Step &s : steps) {
        const LayerDesc &last = layers[s.last].desc;
        StepPlan p{h, w, h, w, h, w, 0, 0};
        if (s.form == Step::Form::block) {
            const LayerDesc &dw = layers[s.depthwise].desc;
            if (s.produce >= 0) {
                p.hidden_h = out_size(h, layers[s.produce].desc.stride);
                p.hidden_w = out_size(w, layers[s.produce].desc.stride);
            }
            p.ho = out_size(p.hidden_h, dw.stride);
            p.wo = out_size(p.hidden_w, dw.stride);
            const std::size_t hidden_row = sizeof(float) * p.hidden_w * padded(dw.cin);
            const std::size_t filtered_row = element * p.wo * padded(dw.cin);
            const std::size_t row = hidden_row * dw.stride + filtered_row;
            const std::size_t fixed = hidden_row * 2;
            const std::size_t fits = kFusedBytes > fixed ? (kFusedBytes - fixed) / row : 0;
            p.rows = static_cast<int>(std::clamp<std::size_t>(fits, 1, p.ho));
            p.ring = std::min((p.rows - 1) * dw.stride + 3, p.hidden_h);
            if (by_layers(layers, s, p, threads)) {
                plan.hidden = std::max(plan.hidden, p.hidden_h * hidden_row);
                plan.filtered = std::max(plan.filtered, whole_lines(p.ho * filtered_row));
            }
            plan.scratch = std::max(plan.scratch, p.ring * hidden_row + whole_lines(p.rows * filtered_row));
        } else if (s.form == Step::Form::single) {
            p.ho = out_size(h, last.stride);
            p.wo = out_size(w, last.stride);
            // What is no float32 passes through rows that are: the depthwise layer's input, the stem's output.
            p.ring = std::min(3, h);
            const bool filters = last.kind == Kind::depthwise;
            if (element != sizeof(float) && last.kind != Kind::pointwise)
                plan.scratch =
                    std::max(plan.scratch, sizeof(float) * (filters ? p.ring * static_cast<std::size_t>(w) : p.wo) *
                                               padded(filters ? last.cin : last.cout));
        } else if (s.form == Step::Form::head) {
            plan.scratch = std::max(plan.scratch, sizeof(float) * kPoolChunk * 2 * kChannelPad);
        }
        if (s.form == Step::Form::block || s.form == Step::Form::single)
            plan.activation = std::max(plan.activation, whole_lines(element * p.ho * p.wo * padded(last.cout)));
        plan.steps.push_back(p);
        h = p.ho;
        w = p.wo;
    }
    if (layers.front().desc.kind == Kind::stem)
        plan.scratch += sizeof(float) * (kStemRing + 1) * stem_row(plan.w);
    return plan;
}

} // namespace mnv2
