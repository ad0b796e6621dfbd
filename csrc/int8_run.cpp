#include "int8_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mnv2 {

// Bytes of weights fetched before their use, half of an L2 (the classifier from 47 to 29 us, the head from 66 to 62).
constexpr std::ptrdiff_t kAhead = 1 << 20;

Int8Runner::Arena Int8Runner::arena(std::uint8_t *memory, const Team &team, Int8Ahead &ahead) const {
    Arena a;
    const auto take = [&memory](std::size_t bytes) {
        std::uint8_t *p = memory;
        memory += bytes;
        return p;
    };
    a.activation[0] = take(plan_.activation);
    a.activation[1] = take(plan_.activation);
    a.residual = reinterpret_cast<float *>(take(plan_.residual));
    a.filtered = take(plan_.filtered);
    take(team.rank() * plan_.scratch());
    a.rows = take(plan_.rows);
    a.zeros = take(plan_.zeros);
    a.sums = reinterpret_cast<std::int64_t *>(take(plan_.sums));
    a.block = take(plan_.block);
    a.ahead = &ahead;
    std::memset(a.zeros, 0, plan_.zeros);
    return a;
}

void Int8Runner::run(Team &team, std::uint8_t *memory) const {
    Int8Ahead ahead{};
    share_images(team, plan_, call_.n, memory, [&](Team &part, std::uint8_t *at, int begin, int end) {
        const Arena arena = this->arena(at, part, ahead);
        for (int k = begin; k < end; ++k)
            image(part, arena, k);
    });
    StepClock clock(seconds_, team);
    classify(team);
    clock.stop(static_cast<int>(steps_.size()));
}

void Int8Runner::image(Team &team, const Arena &arena, int image) const {
    Tensor x{nullptr, 0, 0, 0};
    arena.ahead->next = layers_.front().weight;
    StepClock clock(seconds_, team);
    for (std::size_t i = 0; i < steps_.size(); ++i) {
        const int step = static_cast<int>(i);
        const Int8Step &s = steps_[i];
        const Int8StepPlan &p = plan_.steps[i];
        const Tensor y{arena.activation[i % 2], p.ho, p.wo, int8_column(layers_[s.last].desc.cout)};
        if (s.form == Int8Step::Form::head)
            head(team, arena, step, image, x);
        else if (s.form == Int8Step::Form::stem)
            stem(team, arena, step, image, y);
        else if (p.forms.of(team.size()) == Int8BlockForm::channels)
            block_by_channels(team, arena, step, x, y);
        else
            block_by_rows(team, arena, step, image, x, y);
        team.sync();
        clock.stop(step);
        x = y;
    }
}

// Lets a kernel fetch the weights of the layers after its own: of 3.5 MB that lie in L3, each image needs them all.
Int8Ahead *Int8Runner::fetch(const Arena &arena, const Int8Layer &layer) const {
    Int8Ahead &ahead = *arena.ahead;
    const Int8Layer &last = layers_.back();
    const std::int8_t *const end =
        last.weight + static_cast<std::ptrdiff_t>(last.vectors) * last.quads * vector_bytes();
    ahead.next = std::max(ahead.next, layer.weight);
    ahead.end = end - layer.weight < kAhead ? end : layer.weight + kAhead;
    return &ahead;
}

void Int8Runner::stem(Team &team, const Arena &arena, int step, int image, const Tensor &y) const {
    long begin, end;
    team.share(groups(y.h), 1, begin, end);
    int loaded = -1;
    const Int8Target target{y.data, y.group(), y.column, false, 0};
    stem_groups(layers_[steps_[step].last], image, arena, static_cast<int>(begin), static_cast<int>(end), y.h, y.w,
                target, groups(y.h), loaded);
}

// A strip of output row groups for each member; p.chunk of them at a time, their hidden row groups in a ring.
void Int8Runner::block_by_rows(Team &team, const Arena &arena, int step, int image, const Tensor &x,
                               const Tensor &y) const {
    const Int8Step &s = steps_[step];
    const Int8StepPlan &p = plan_.steps[step];
    const Int8Layer &produce = layers_[s.produce], &depthwise = layers_[s.depthwise];
    const bool from_image = produce.desc.kind == Kind::stem;
    const int stride = depthwise.desc.stride, vectors = depthwise.vectors, hidden_groups = groups(p.hidden_h);
    const std::ptrdiff_t hidden_group = p.hidden_w * vector_bytes(), hidden_vector = p.ring * hidden_group;
    std::uint8_t *const hidden = arena.block;
    const Tensor filtered{hidden + (p.kept * hidden_vector + 63) / 64 * 64, p.ho, p.wo,
                          int8_column(depthwise.desc.cout)};

    long begin, end;
    team.share(groups(p.ho), 1, begin, end);
    int made = std::max(0, static_cast<int>(begin) * stride - 1); // the next hidden row group to make
    int loaded = -1;                                              // the stem's last row group at hand
    for (int g = static_cast<int>(begin); g < end; g += p.chunk) {
        const int last = std::min(g + p.chunk, static_cast<int>(end));
        const int needed = std::min(hidden_groups, stride == 1 ? last + 1 : 2 * last);
        // Below a member's strip only the first row of a group is looked at.
        const int height = last < end ? p.hidden_h : std::min(p.hidden_h, (stride * last * kGroup + 2 - stride));
        if (from_image)
            stem_groups(produce, image, arena, made, needed, height, p.hidden_w,
                        {hidden, hidden_group, vector_bytes(), true, hidden_vector}, p.ring, loaded);
        // Two vectors of channels are expanded and filtered before the next ones, their rows still in L1.
        for (int v = 0; v < vectors; v += 2) {
            const int v_end = std::min(v + 2, vectors);
            std::uint8_t *const panel = hidden + (p.kept == vectors ? v * hidden_vector : 0);
            if (!from_image)
                expand(produce, arena, {x.data, height, x.w, x.column}, made, needed, v, v_end, panel, p.ring,
                       p.hidden_w);
            kernels_.int8_depthwise({panel, hidden_vector, hidden_group, p.ring, hidden_groups, arena.zeros,
                                     depthwise.weight, depthwise.scales, v, v_end, p.hidden_w, stride, g, last,
                                     filtered.data, filtered.group(), filtered.column});
        }
        made = needed;
        project(s, arena, filtered, g, y, {g, last, 0, p.wo, 0, layers_[s.last].vectors});
    }
}

// A share of the hidden channels for each member, expanded and filtered over the whole image; then, once all are there,
// a share of the output.
void Int8Runner::block_by_channels(Team &team, const Arena &arena, int step, const Tensor &x, const Tensor &y) const {
    const Int8Step &s = steps_[step];
    const Int8StepPlan &p = plan_.steps[step];
    const Int8Layer &depthwise = layers_[s.depthwise];
    const int hidden_groups = groups(p.hidden_h), made = groups(p.ho);
    const std::ptrdiff_t hidden_group = p.hidden_w * vector_bytes(), hidden_vector = hidden_groups * hidden_group;
    const Tensor filtered{arena.filtered, p.ho, p.wo, int8_column(depthwise.desc.cout)};

    long begin, end;
    team.share(depthwise.vectors, 1, begin, end);
    for (int v = static_cast<int>(begin); v < end; v += 2) {
        const int v_end = std::min(v + 2, static_cast<int>(end));
        expand(layers_[s.produce], arena, x, 0, hidden_groups, v, v_end, arena.block, hidden_groups, p.hidden_w);
        kernels_.int8_depthwise({arena.block, hidden_vector, hidden_group, hidden_groups, hidden_groups, arena.zeros,
                                 depthwise.weight, depthwise.scales, v, v_end, p.hidden_w, depthwise.desc.stride, 0,
                                 made, filtered.data, filtered.group(), filtered.column});
    }
    team.sync();

    long column_begin = 0, column_end = p.wo, vector_begin = 0, vector_end = layers_[s.last].vectors;
    if (p.wo >= 8 * team.size())
        team.share(p.wo, 1, column_begin, column_end);
    else
        team.share(vector_end, 1, vector_begin, vector_end);
    project(s, arena, filtered, 0, y,
            {0, made, static_cast<int>(column_begin), static_cast<int>(column_end), static_cast<int>(vector_begin),
             static_cast<int>(vector_end)});
}

// Vectors of hidden row groups [begin, end), into a ring that starts with vector_begin.
void Int8Runner::expand(const Int8Layer &layer, const Arena &arena, const Tensor &x, int begin, int end,
                        int vector_begin, int vector_end, std::uint8_t *hidden, int ring, int width) const {
    const std::ptrdiff_t group = width * vector_bytes(), vector = ring * group;
    while (begin < end) {
        const int slot = begin % ring, next = std::min(end, begin + ring - slot);
        kernels_.int8_expand({{x.part(begin, next, 0, width), layer.weight, layer.quads, layer.scales, vector_begin,
                               vector_end, fetch(arena, layer)},
                              {hidden + slot * group - vector_begin * vector, group, vector_bytes(), true, vector}});
        begin = next;
    }
}

// A part of the block's output, from filtered row groups of which `first` is the first.
void Int8Runner::project(const Int8Step &s, const Arena &arena, const Tensor &filtered, int first, const Tensor &y,
                         const Part &part) const {
    if (part.column_begin == part.column_end)
        return;
    const Int8Layer &layer = layers_[s.last];
    Int8Pixels x = filtered.part(part.group_begin, part.group_end, part.column_begin, part.column_end);
    x.x -= first * filtered.group();
    const std::ptrdiff_t at = part.group_begin * y.group() + part.column_begin * y.column; // bytes, and floats
    kernels_.int8_project(
        {{x, layer.weight, layer.quads, layer.scales, part.vector_begin, part.vector_end, fetch(arena, layer)},
         y.data + at,
         y.group(),
         y.column,
         arena.residual + at,
         y.group(),
         y.column,
         y.column / kGroup,
         layer.desc.residual != 0,
         s.keep});
}

// The last 1x1 layer, summed at once; its output is never written.
void Int8Runner::head(Team &team, const Arena &arena, int step, int image, const Tensor &x) const {
    const Int8Layer &layer = layers_[steps_[step].last];
    long begin, end;
    team.share(layer.vectors, 1, begin, end);
    const int channel_begin = static_cast<int>(begin) * kernels_.lanes;
    const int channel_end = std::min(static_cast<int>(end) * kernels_.lanes, layer.desc.cout);
    if (channel_begin >= channel_end)
        return;
    std::memset(arena.sums, 0, plan_.sums);
    constexpr int kColumns = 1 << 16;
    for (int column = 0; column < x.w; column += kColumns) {
        const int columns = std::min(kColumns, x.w - column);
        const int chunk = static_cast<int>(kInt8HeadPixels / (kGroup * static_cast<std::ptrdiff_t>(columns)));
        for (int g = 0; g < groups(x.h); g += chunk)
            kernels_.int8_head(
                {{x.part(g, std::min(g + chunk, groups(x.h)), column, column + columns), layer.weight, layer.quads,
                  layer.scales, static_cast<int>(begin), static_cast<int>(end), fetch(arena, layer)},
                 arena.sums});
    }
    const double steps = feature_steps(layer.desc.cout), pixels = static_cast<double>(x.h) * x.w;
    for (int c = channel_begin; c < channel_end; ++c)
        features_.put(image, c, static_cast<int>(std::nearbyint(static_cast<double>(arena.sums[c]) * steps / pixels)));
}

void Int8Runner::classify(Team &team) const {
    const Int8Layer &layer = layers_.back();
    long begin, end;
    team.share(layer.vectors, 1, begin, end);
    kernels_.int8_classify({features_.data, call_.n, layer.weight, layer.scales, layer.quads, static_cast<int>(begin),
                            static_cast<int>(end), call_.y, layer.desc.cout, layer.desc.cout});
}

// Row groups [begin, end) of the stem's output, into a ring. `loaded` is the last group whose input rows are at hand.
void Int8Runner::stem_groups(const Int8Layer &layer, int image, const Arena &arena, int begin, int end, int height,
                             int width, Int8Target target, int ring, int &loaded) const {
    const std::ptrdiff_t row = int8_stem_row(plan_.w);
    std::uint8_t *const y = target.y;
    for (int g = begin; g < end; ++g) {
        // Input rows 8g - 1 .. 8g + 7; the first is the last of the group before.
        const bool next = loaded >= 0 && loaded + 1 == g;
        if (next)
            std::memcpy(arena.rows, arena.rows + (kInt8StemRows - 1) * row, row);
        for (int i = next ? 1 : 0; i < kInt8StemRows; ++i)
            load_row(image, 2 * kGroup * g - 1 + i, arena.rows + i * row);
        loaded = g;
        target.y = y + g % ring * target.group;
        kernels_.int8_stem({arena.rows, row, layer.weight, layer.scales, layer.vectors,
                            std::min(kGroup, height - g * kGroup), width, target, fetch(arena, layer)});
    }
}

// One input row as R, G, B, 0, between its two pixels of padding; a row of padding outside the image.
void Int8Runner::load_row(int image, int row, std::uint8_t *out) const {
    const std::ptrdiff_t width = plan_.w;
    const auto pad = [&](std::ptrdiff_t from, std::ptrdiff_t to) {
        for (std::ptrdiff_t w = from; w < to; ++w) {
            std::memcpy(out + 4 * w, input_.zero.data(), 3);
            out[4 * w + 3] = 0;
        }
    };
    if (row < 0 || row >= plan_.h) {
        pad(0, width + 2);
        return;
    }
    const std::ptrdiff_t at = image * call_.stride_n + row * call_.stride_h;
    if (call_.bytes) {
        const std::uint8_t *const in = static_cast<const std::uint8_t *>(call_.x) + at;
        const std::uint32_t *const table = input_.table.data();
        for (std::ptrdiff_t w = 0; w < width; ++w) {
            const std::uint8_t *const p = in + w * call_.stride_w;
            const std::uint32_t pixel =
                table[p[0]] | table[256 + p[call_.stride_c]] | table[512 + p[2 * call_.stride_c]];
            std::memcpy(out + 4 * (w + 1), &pixel, 4);
        }
    } else {
        const float *const in = static_cast<const float *>(call_.x) + at;
        bool finite = true;
        kernels_.int8_load({{in, in + call_.stride_c, in + 2 * call_.stride_c},
                            call_.stride_w,
                            2 * call_.stride_h,
                            plan_.w,
                            input_.scale.data(),
                            input_.zero.data(),
                            out + 4,
                            &finite});
        if (!finite)
            finite_.store(false, std::memory_order_relaxed);
    }
    pad(0, 1);
    pad(width + 1, width + 2);
}

} // namespace mnv2
