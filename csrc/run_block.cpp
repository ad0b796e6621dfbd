// The steps of convolutions: blocks in each of their forms, and lone layers.
#include <algorithm>

#include "run_pointwise.h"

namespace mnv2 {
namespace {

void call(const KernelTable &kernels, const Depthwise<float> &args) { kernels.depthwise(args); }
void call(const KernelTable &kernels, const Depthwise<bf16> &args) { kernels.depthwise_bf16(args); }

} // namespace

// A block's layers, and where its thread keeps what lies between them.
template <class T> struct Runner<T>::Block {
    const StepPlan &p;
    const Layer *produce; // null where the block begins with its depthwise layer
    const Layer &depthwise, &project;
    bool stem;
    int stride;
    int hidden;   // channels
    int ld;       // of hidden and filtered tensors
    int panel;    // hidden channels that are made and filtered together
    float *input; // rows of the stem
    float *ring;
    T *filtered;

    // Floats of a panel's ring.
    std::ptrdiff_t ring_size() const { return static_cast<std::ptrdiff_t>(p.ring) * p.hidden_w * panel; }
};

template <class T> typename Runner<T>::Block Runner<T>::place_block(const Arena &arena, int step) const {
    const Step &s = steps_[step];
    const StepPlan &p = plan_.steps[step];
    const Layer *const produce = s.produce >= 0 ? &layers_[s.produce] : nullptr;
    const LayerDesc &d = layers_[s.depthwise].desc;
    const bool stem = produce && produce->desc.kind == Kind::stem;
    float *const input = reinterpret_cast<float *>(arena.scratch);
    float *const ring = input + (layers_.front().desc.kind == Kind::stem ? (kStemRing + 1) * stem_row(plan_.w) : 0);
    const int ld = padded(d.cin);
    return {p,     produce, layers_[s.depthwise],       layers_[s.last], stem, d.stride,
            d.cin, ld,      stem ? ld : kernels_.panel, input,           ring, reinterpret_cast<T *>(ring + p.rings)};
}

// Output rows [begin, end) of a depthwise layer, channels [channel, channel + channels) as far as they exist, of which
// the first is a multiple of a vector's. `in` and `y` start at that channel, `y` at row `begin`.
template <class T>
void Runner<T>::depthwise(const Layer &layer, const Rows &in, long begin, long end, T *y, std::ptrdiff_t y_ld,
                          int channel, int channels) const {
    const LayerDesc &d = layer.desc;
    const std::ptrdiff_t y_row = ((in.width - 1) / d.stride + 1) * y_ld;
    for (long o = begin; o < end; o += kMaxGroup, y += kMaxGroup * y_row) {
        const int outputs = static_cast<int>(std::min<long>(end - o, kMaxGroup)), count = (outputs - 1) * d.stride + 3;
        const float *rows[(kMaxGroup - 1) * 2 + 3];
        for (int i = 0; i < count; ++i)
            rows[i] = in.at(o * d.stride - 1 + i);
        call(kernels_,
             Depthwise<T>{rows, in.ld,
                          static_cast<const float *>(layer.packed.weight) +
                              static_cast<std::ptrdiff_t>(channel) * kDepthwiseBlock,
                          y, y_ld, y_row, outputs, in.width, d.stride, std::min(channels, d.cout - channel), d.relu6});
    }
}

// Hidden rows [from, to) of the panel from `channel` on, into its ring.
template <class T>
void Runner<T>::expand_panel(const Block &b, const Ends &t, const Rows &hidden, float *ring, int channel, int from,
                             int to) const {
    const std::ptrdiff_t width = hidden.width;
    while (from < to) {
        const int slot = from % hidden.ring, rows = std::min(to - from, hidden.ring - slot);
        multiply<T, float>(*b.produce, channel, std::min(b.panel, b.hidden - channel),
                           {t.x + from * width * t.x_ld, t.x_ld, ring + slot * width * hidden.ld, hidden.ld, 0},
                           rows * width, nullptr, 0, 0, 1);
        from += rows;
    }
}

// Channels [channel, channel + channels) of rows [from, to) of a step's input, into the ring of the depthwise layer
// that follows.
template <class T>
void Runner<T>::widen_rows(const Ends &t, const Rows &ring, float *out, int channel, int from, int to,
                           int channels) const {
    const std::ptrdiff_t width = ring.width;
    if constexpr (!kFloat)
        for (; from < to; ++from)
            kernels_.widen({t.x + from * width * t.x_ld + channel, t.x_ld, out + from % ring.ring * width * ring.ld,
                            ring.ld, width, channels});
}

// Output rows [begin, end) of the panel of hidden channels from `channel` on, p.group at a time, so that its hidden
// rows stay in L1 (of bf16 tiles: in L2). `ring` has those before row `made`; returns the row that is made next.
// `loaded` is of the stem; `out` starts at row `begin`.
template <class T>
int Runner<T>::filter_panel(const Block &b, const Ends &t, int channel, int begin, int end, int made, float *ring,
                            int &loaded, T *out) const {
    Rows hidden{ring, b.panel, b.p.hidden_h, b.p.hidden_w, b.p.ring};
    if constexpr (kFloat)
        if (!b.produce)
            hidden = {t.x + channel, t.x_ld, b.p.hidden_h, b.p.hidden_w, b.p.hidden_h};
    for (int o = begin; o < end; o += b.p.group) {
        const int last = std::min(o + b.p.group, end), needed = std::min(b.p.hidden_h, (last - 1) * b.stride + 2);
        for (; b.stem && made < needed; ++made)
            stem_rows(*b.produce, t.image, made, made + 1, b.p.hidden_w,
                      ring + static_cast<std::ptrdiff_t>(made % b.p.ring) * b.p.hidden_w * b.panel, b.panel, b.input,
                      loaded);
        if (b.produce && !b.stem)
            expand_panel(b, t, hidden, ring, channel, made, needed);
        else if (!kFloat && !b.produce)
            widen_rows(t, hidden, ring, channel, made, needed, std::min(b.panel, b.hidden - channel));
        made = needed;
        depthwise(b.depthwise, hidden, o, last, out + static_cast<std::ptrdiff_t>(o - begin) * b.p.wo * b.ld, b.ld,
                  channel, b.panel);
    }
    return made;
}

// A strip of output rows for each member, about p.rows of them at a time.
template <class T> void Runner<T>::fused(Team &team, const Block &b, const Ends &t) const {
    long begin, end;
    team.share(b.p.ho, 1, begin, end);
    const long strips = (end - begin + b.p.rows - 1) / b.p.rows;
    const std::ptrdiff_t next_ring = strips > 1 ? b.ring_size() : 0;
    int made = std::max(0, static_cast<int>(begin) * b.stride - 1);
    int loaded = -1;
    for (long strip = 0; strip < strips; ++strip) {
        const int from = static_cast<int>(begin + (end - begin) * strip / strips);
        const int to = static_cast<int>(begin + (end - begin) * (strip + 1) / strips);
        int next = made;
        for (int c = 0; c < b.hidden; c += b.panel)
            next = filter_panel(b, t, c, from, to, made, b.ring + c / b.panel * next_ring, loaded, b.filtered + c);
        made = next;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(from) * b.p.wo;
        pointwise<T, T>(b.project, {b.filtered, b.ld, t.y + at * t.y_ld, t.y_ld, 0}, 0,
                        static_cast<std::ptrdiff_t>(to - from) * b.p.wo,
                        b.project.desc.residual ? t.x + at * t.x_ld : nullptr, t.x_ld, 0, panels(b.project));
    }
}

// Panels of hidden channels for each member; then the projection, shared as its own shape asks.
template <class T> void Runner<T>::part_fused(Team &team, const Arena &arena, const Block &b, const Ends &t) const {
    long begin, end;
    team.share(b.hidden, b.panel, begin, end);
    int loaded = -1;
    for (int c = static_cast<int>(begin); c < end; c += b.panel)
        filter_panel(b, t, c, 0, b.p.ho, 0, b.ring, loaded, arena.filtered + c);
    team.sync();
    pointwise<T, T>(team, b.project, {arena.filtered, b.ld, t.y, t.y_ld, 0},
                    static_cast<std::ptrdiff_t>(b.p.ho) * b.p.wo, b.project.desc.residual ? t.x : nullptr, t.x_ld);
}

// Expand, wait, depthwise, wait, project: each layer shared by the team as its own shape asks.
template <class T> void Runner<T>::by_layers(Team &team, const Arena &arena, const Block &b, const Ends &t) const {
    const StepPlan &p = b.p;
    const std::ptrdiff_t in_pixels = static_cast<std::ptrdiff_t>(p.hidden_h) * p.hidden_w;
    long begin, end;
    if (b.stem) {
        team.share(p.hidden_h, 1, begin, end);
        int loaded = -1;
        stem_rows(*b.produce, t.image, static_cast<int>(begin), static_cast<int>(end), p.hidden_w,
                  arena.hidden + begin * p.hidden_w * b.ld, b.ld, b.input, loaded);
    } else if (b.produce) {
        pointwise<T, float>(team, *b.produce, {t.x, t.x_ld, arena.hidden, b.ld, 0}, in_pixels, nullptr, 0);
    }
    if (b.produce)
        team.sync();

    Rows hidden{arena.hidden, b.ld, p.hidden_h, p.hidden_w, p.hidden_h};
    if constexpr (kFloat)
        if (!b.produce)
            hidden = {t.x, t.x_ld, p.hidden_h, p.hidden_w, p.hidden_h};
    if (p.ho % team.size() == 0) {
        team.share(p.ho, 1, begin, end);
        depthwise(b.depthwise, hidden, begin, end, arena.filtered + begin * p.wo * b.ld, b.ld, 0, b.hidden);
    } else {
        team.share(b.hidden, kernels_.lanes, begin, end);
        Rows mine = hidden;
        mine.x += begin;
        if (begin < end)
            depthwise(b.depthwise, mine, 0, p.ho, arena.filtered + begin, b.ld, static_cast<int>(begin),
                      static_cast<int>(end - begin));
    }
    team.sync();

    pointwise<T, T>(team, b.project, {arena.filtered, b.ld, t.y, t.y_ld, 0}, static_cast<std::ptrdiff_t>(p.ho) * p.wo,
                    b.project.desc.residual ? t.x : nullptr, t.x_ld);
}

template <class T> void Runner<T>::block(Team &team, const Arena &arena, int step, const Ends &t) const {
    const Block b = place_block(arena, step);
    switch (b.p.forms.of(team.size())) {
    case BlockForm::fused:
        fused(team, b, t);
        return;
    case BlockForm::part:
        part_fused(team, arena, b, t);
        return;
    case BlockForm::layers:
        by_layers(team, arena, b, t);
    }
}

template <class T> void Runner<T>::single(Team &team, const Arena &arena, int step, const Ends &t) const {
    const StepPlan &p = plan_.steps[step];
    const Layer &layer = layers_[steps_[step].last];
    const LayerDesc &d = layer.desc;
    if (d.kind == Kind::pointwise) {
        const std::ptrdiff_t pixels = static_cast<std::ptrdiff_t>(p.h) * p.w;
        const T *given = static_cast<const T *>(call_.residual);
        pointwise<T, T>(team, layer, t, pixels, given ? given + t.image * pixels * d.cout : nullptr, d.cout);
        return;
    }
    long begin, end;
    team.share(p.ho, 1, begin, end);
    float *const rows = reinterpret_cast<float *>(arena.scratch);
    if (d.kind == Kind::stem) {
        int loaded = -1;
        for (int o = static_cast<int>(begin); o < end; ++o) {
            T *const y = t.y + static_cast<std::ptrdiff_t>(o) * p.wo * t.y_ld;
            if constexpr (kFloat) {
                stem_rows(layer, t.image, o, o + 1, p.wo, y, t.y_ld, rows, loaded);
            } else {
                float *const row = rows + (kStemRing + 1) * stem_row(plan_.w);
                stem_rows(layer, t.image, o, o + 1, p.wo, row, padded(d.cout), rows, loaded);
                kernels_.narrow({row, padded(d.cout), y, t.y_ld, p.wo, d.cout});
            }
        }
        return;
    }
    if constexpr (kFloat) {
        if (begin < end)
            depthwise(layer, {t.x, t.x_ld, p.h, p.w, p.h}, begin, end, t.y + begin * p.wo * t.y_ld, t.y_ld, 0, d.cin);
        return;
    }
    const Rows in{rows, padded(d.cin), p.h, p.w, p.ring};
    int made = std::max(0, static_cast<int>(begin) * d.stride - 1); // the next row to widen
    for (int o = static_cast<int>(begin); o < end; ++o) {
        const int needed = std::min(p.h, o * d.stride + 2);
        widen_rows(t, in, rows, 0, made, needed, d.cin);
        made = needed;
        depthwise(layer, in, o, o + 1, t.y + static_cast<std::ptrdiff_t>(o) * p.wo * t.y_ld, t.y_ld, 0, d.cin);
    }
}

template void Runner<float>::block(Team &, const Arena &, int, const Ends &) const;
template void Runner<float>::single(Team &, const Arena &, int, const Ends &) const;
template void Runner<bf16>::block(Team &, const Arena &, int, const Ends &) const;
template void Runner<bf16>::single(Team &, const Arena &, int, const Ends &) const;

} // namespace mnv2
