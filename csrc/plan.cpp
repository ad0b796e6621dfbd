#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "pack.h"

namespace mnv2 {
namespace {

// Bytes of filtered rows that a fused block keeps before it projects them, in L2 (1 MB and more) beside weights and
// pixels. 256k and 640k measure alike, 96k costs 1% of an image.
constexpr std::size_t kFilteredBytes = 256 * 1024;

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

constexpr FormRow<BlockForm> kForms[] = {
#define FORM(threads, rows, form) {threads, rows, BlockForm::form},
#include "forms.def"
#undef FORM
};

// A block of which only the project layer may add its own input, which is the hidden tensor's source.
bool residual_fits(const std::vector<Layer> &layers, const Step &s) {
    const LayerDesc &first = layers[s.first()].desc, &last = layers[s.last].desc;
    if (last.residual == 0)
        return true;
    return last.residual == s.last - s.first() && first.kind != Kind::stem && first.cin == last.cout &&
           layers[s.depthwise].desc.stride == 1;
}

// The forms of a block and the memory they need.
void plan_block(Plan &plan, StepPlan &p, const std::vector<Layer> &layers, const Step &s, std::size_t element,
                std::size_t ring_bytes, const BlockForm *forced) {
    const LayerDesc &dw = layers[s.depthwise].desc;
    const bool expands = s.produce >= 0 && layers[s.produce].desc.kind == Kind::pointwise;
    const int team = std::max(plan.threads, 2);
    p.forms = forced ? Forms<BlockForm>{*forced, *forced}
                     : Forms<BlockForm>{look_up(kForms, 1, p.ho), look_up(kForms, team, (p.ho - 1) / team + 1)};
    const bool widens = s.produce < 0 && element != sizeof(float); // the input, for the depthwise layer
    for (BlockForm *form : {&p.forms.alone, &p.forms.together})
        if ((*form == BlockForm::part && !expands) || (*form == BlockForm::layers && widens))
            *form = BlockForm::fused;

    const int channels = round_up(dw.cin, kMaxPanel);
    const std::size_t filtered_row = element * p.wo * padded(dw.cin);
    const std::size_t ring_row = sizeof(float) * p.hidden_w * (s.produce < 0 || expands ? kMaxPanel : channels);
    const int fits = static_cast<int>(std::min<std::size_t>(ring_bytes / ring_row, kMaxGroup * 2 + 1));
    p.rows = static_cast<int>(std::clamp<std::size_t>(kFilteredBytes / filtered_row, 1, p.ho));
    p.group = std::clamp((fits - 3) / dw.stride + 1, 1, std::min(kMaxGroup, p.ho));
    p.ring = std::min((p.group - 1) * dw.stride + 3, p.hidden_h);
    // A ring for each panel keeps its last rows for the next strip; with one strip, all panels use the same.
    if (s.produce >= 0 || widens)
        p.rings = static_cast<std::size_t>(p.ring) * p.hidden_w *
                  ((expands || widens) && p.rows == p.ho ? kMaxPanel : channels);
    if (p.forms.has(BlockForm::layers) && s.produce >= 0)
        plan.hidden = std::max(plan.hidden, sizeof(float) * p.hidden_h * p.hidden_w * padded(dw.cin));
    if (p.forms.has(BlockForm::layers) || p.forms.has(BlockForm::part))
        plan.filtered = std::max(plan.filtered, whole_lines(p.ho * filtered_row));
    plan.scratch = std::max(plan.scratch, sizeof(float) * p.rings + whole_lines(p.rows * filtered_row));
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

Plan make_plan(const std::vector<Layer> &layers, const std::vector<Step> &steps, int h, int w, int threads,
               std::size_t element, std::size_t ring_bytes, const BlockForm *forced) {
    if (static_cast<std::int64_t>(h) * w > kMaxPixels)
        throw std::length_error("an image has more than 2**36 pixels");
    Plan plan;
    plan.h = h;
    plan.w = w;
    plan.threads = threads;
    const auto out_size = [](int size, int stride) { return (size - 1) / stride + 1; };
    for (const Step &s : steps) {
        const LayerDesc &last = layers[s.last].desc;
        StepPlan p{h, w, h, w, h, w, {BlockForm::fused, BlockForm::fused}, 0, 0, 0, 0};
        if (s.form == Step::Form::block) {
            const LayerDesc &dw = layers[s.depthwise].desc;
            if (s.produce >= 0) {
                p.hidden_h = out_size(h, layers[s.produce].desc.stride);
                p.hidden_w = out_size(w, layers[s.produce].desc.stride);
            }
            p.ho = out_size(p.hidden_h, dw.stride);
            p.wo = out_size(p.hidden_w, dw.stride);
            plan_block(plan, p, layers, s, element, ring_bytes, forced);
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
    const LayerDesc &last = layers.back().desc;
    if (last.kind == Kind::linear && !layers.back().packed.pairs && steps.size() > 1 &&
        !(forced && *forced == BlockForm::layers))
        plan.sums = sizeof(float) * ((last.cin - 1) / kPiece + 1) * padded(last.cout);
    if (layers.front().desc.kind == Kind::stem)
        plan.scratch += sizeof(float) * (kStemRing + 1) * stem_row(plan.w);
    return plan;
}

} // namespace mnv2
