#include "run.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <type_traits>
#include <utility>

namespace mnv2 {
namespace {

void to_floats(float *to, const float *from, std::ptrdiff_t count) { std::memcpy(to, from, sizeof(float) * count); }
void to_floats(float *to, const bf16 *from, std::ptrdiff_t count) {
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        const std::uint32_t bits = static_cast<std::uint32_t>(from[i].bits) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

// What a kernel of the table takes says which one it is.
void call(const KernelTable &kernels, const Pointwise<float> &args) { kernels.pointwise(args); }
void call(const KernelTable &kernels, const Pointwise<bf16> &args) { kernels.pointwise_bf16(args); }
void call(const KernelTable &kernels, const Pointwise<bf16, bf16, float> &args) { kernels.pointwise_bf16_float(args); }
void call(const KernelTable &kernels, const Pointwise<float, bf16, float> &args) { kernels.pointwise_mixed(args); }
void call(const KernelTable &kernels, const Depthwise<float> &args) { kernels.depthwise(args); }
void call(const KernelTable &kernels, const Depthwise<bf16> &args) { kernels.depthwise_bf16(args); }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

} // namespace

template <class T> typename Runner<T>::Arena Runner<T>::arena(std::byte *memory, const Team &team) const {
    Arena a;
    const auto take = [&memory](std::size_t bytes, auto *&tensor) {
        tensor = reinterpret_cast<std::remove_reference_t<decltype(tensor)>>(memory);
        memory += bytes;
    };
    take(plan_.activation, a.activation[0]);
    take(plan_.activation, a.activation[1]);
    take(plan_.hidden, a.hidden);
    take(plan_.filtered, a.filtered);
    take(plan_.sums, a.sums);
    a.scratch = memory + team.rank() * plan_.scratch;
    return a;
}

template <class T> void Runner<T>::run(Team &team, std::byte *memory, void *features) const {
    share_images(team, plan_, call_.n, memory, [&](Team &part, std::byte *at, int begin, int end) {
        const Arena arena = this->arena(at, part);
        for (int k = begin; k < end; ++k)
            image(part, arena, k, features);
    });
    if (steps_.back().form != Step::Form::linear || head_classifies())
        return;
    const int last = static_cast<int>(steps_.size()) - 1;
    double since = seconds_ ? now() : 0;
    linear(team, last, static_cast<const T *>(last > 0 ? features : call_.x), call_.n);
    clock(team, last, since);
}

// The time of a step as the first member of the team sees it, waits included.
template <class T> void Runner<T>::clock(const Team &team, int step, double &since) const {
    if (!seconds_ || team.rank() != 0)
        return;
    const double time = now();
    seconds_[step] = time - since;
    since = time;
}

// Every step for one image, but for a linear last one, which runs once for all.
template <class T> void Runner<T>::image(Team &team, const Arena &arena, int image, void *features) const {
    const T *x = nullptr; // the call's own
    double since = seconds_ ? now() : 0;
    for (std::size_t i = 0; i < steps_.size() && steps_[i].form != Step::Form::linear; ++i) {
        const int step = static_cast<int>(i);
        const Ends t = place(step, x, arena.activation[i % 2], image);
        run_step(team, arena, step, t, features);
        team.sync();
        clock(team, step, since);
        x = t.y;
    }
}

// Where a step reads and writes: `x` and `y`, but at the ends of the network the caller's tensors.
template <class T> typename Runner<T>::Ends Runner<T>::place(int step, const T *x, T *y, int image) const {
    const Step &s = steps_[step];
    const LayerDesc &first = layers_[s.first()].desc, &d = layers_[s.last].desc;
    Ends t{x, padded(first.cin), y, padded(d.cout), image};
    if (!x && first.kind != Kind::stem) {
        t.x = static_cast<const T *>(call_.x) + image * call_.stride_n;
        t.x_ld = call_.stride_w;
    }
    if (s.form != Step::Form::head && step + 1 == static_cast<int>(steps_.size())) {
        const StepPlan &p = plan_.steps[step];
        t.y = static_cast<T *>(call_.y) + static_cast<std::ptrdiff_t>(image) * p.ho * p.wo * d.cout;
        t.y_ld = d.cout;
    }
    return t;
}

template <class T>
void Runner<T>::run_step(Team &team, const Arena &arena, int step, const Ends &t, void *features) const {
    const Step &s = steps_[step];
    if (s.form == Step::Form::head)
        head(team, arena, step, t, features);
    else if (s.form == Step::Form::single)
        single(team, arena, step, t);
    else if (const Block b = block(arena, step); b.p.form(team.size()) == BlockForm::layers)
        by_layers(team, arena, b, t);
    else if (b.p.form(team.size()) == BlockForm::part)
        part_fused(team, arena, b, t);
    else
        fused(team, b, t);
}

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

template <class T> typename Runner<T>::Block Runner<T>::block(const Arena &arena, int step) const {
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
// rows never leave L1. `ring` has those before row `made`; returns the row that is made next. `loaded` is of the stem;
// `out` starts at row `begin`.
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

// The last 1x1 layer a panel of channels at a time, summed at once: its output, 250 KB an image, is never written. The
// weights of a linear layer that follows are prefetched meanwhile, a piece of them before the features that they
// multiply are known: read by themselves, 5 MB from L3 take 190 us, 4% of an image on one core.
template <class T> void Runner<T>::head(Team &team, const Arena &arena, int step, const Ends &t, void *features) const {
    const StepPlan &p = plan_.steps[step];
    const Layer &layer = layers_[steps_[step].last];
    const LayerDesc &d = layer.desc;
    const std::ptrdiff_t pixels = static_cast<std::ptrdiff_t>(p.h) * p.w;
    float *const tile = reinterpret_cast<float *>(arena.scratch);
    const std::ptrdiff_t image = static_cast<std::ptrdiff_t>(t.image) * d.cout; // in the features
    const bool classifies = head_classifies();
    const Layer &linear = layers_.back();
    const int classes = linear.desc.cout, columns = packed_columns(kernels_, classes);
    const long per_piece = classifies ? kPiece / kernels_.panel : 1;
    long begin, end;
    team.share(panels(layer), per_piece, begin, end);
    for (long panel = begin; panel < end; ++panel) {
        const int n = static_cast<int>(panel) * kernels_.panel, channels = std::min(kernels_.panel, d.cout - n);
        float sum[kMaxPanel];
        double total[kMaxPanel] = {}; // of the chunks: one long float32 sum would lose digits on a large map
        Ahead ahead{};
        if (classifies)
            ahead = {static_cast<const float *>(linear.packed.weight) + static_cast<std::ptrdiff_t>(n) * columns,
                     static_cast<std::ptrdiff_t>(channels) * columns};
        for (std::ptrdiff_t at = 0; at < pixels; at += kPoolChunk) {
            const std::ptrdiff_t chunk = std::min<std::ptrdiff_t>(kPoolChunk, pixels - at);
            multiply<T, float>(layer, n, channels, {t.x + at * t.x_ld, t.x_ld, tile, kernels_.panel, 0}, chunk, nullptr,
                               0, 0, 1, ahead);
            kernels_.pool({tile, kernels_.panel, sum, chunk, channels});
            for (int c = 0; c < channels; ++c)
                total[c] += sum[c];
        }
        for (int c = 0; c < channels; ++c)
            sum[c] = static_cast<float>(total[c] / static_cast<double>(pixels));
        if (kFloat || steps_.back().form == Step::Form::head)
            std::memcpy(static_cast<float *>(features) + image + n, sum, sizeof(float) * channels);
        else
            kernels_.narrow({sum, 0, static_cast<bf16 *>(features) + image + n, 0, 1, channels});
        if (classifies && ((panel + 1) % per_piece == 0 || panel + 1 == end)) {
            const int k = static_cast<int>(panel / per_piece);
            piece(linear, k, static_cast<const float *>(features) + image + k * kPiece, 1,
                  arena.sums + static_cast<std::ptrdiff_t>(k) * padded(classes), 0, false, 0, panels(linear));
        }
    }
    if (classifies) {
        team.sync();
        add_pieces(team, linear, arena.sums);
    }
}

template <class T> void Runner<T>::linear(Team &team, int step, const T *x, int images) const {
    const Layer &layer = layers_[steps_[step].last];
    const LayerDesc &d = layer.desc;
    float *const y = static_cast<float *>(call_.y);
    if constexpr (kFloat) {
        if (!layer.packed.pairs) {
            long begin, end;
            team.share(panels(layer), 1, begin, end);
            for (int k = 0; k * kPiece < d.cin && begin < end; ++k)
                piece(layer, k, x + k * kPiece, images, y, d.cout, k > 0, static_cast<int>(begin),
                      static_cast<int>(end));
            return;
        }
    }
    pointwise<T, float>(team, layer, {x, d.cin, y, d.cout, 0}, images, nullptr, 0);
}

// What piece number `piece` of the inputs, which `x` begins with, adds to the outputs of a linear layer.
template <class T>
void Runner<T>::piece(const Layer &layer, int piece, const float *x, std::ptrdiff_t images, float *y,
                      std::ptrdiff_t y_ld, bool accumulate, int panel_begin, int panel_end) const {
    const LayerDesc &d = layer.desc;
    const int from = piece * kPiece;
    call(kernels_, Pointwise<float>{x, d.cin,
                                    static_cast<const float *>(layer.packed.weight) +
                                        static_cast<std::ptrdiff_t>(from) * packed_columns(kernels_, d.cout),
                                    piece == 0 ? layer.packed.bias : nullptr, nullptr, 0, y, y_ld, images,
                                    std::min(kPiece, d.cin - from), d.cout, panel_begin, panel_end, false, accumulate});
}

// The outputs of a linear layer for one image: the sums of its pieces, in order.
template <class T> void Runner<T>::add_pieces(Team &team, const Layer &layer, const float *sums) const {
    float *const y = static_cast<float *>(call_.y);
    const int pieces = (layer.desc.cin - 1) / kPiece + 1;
    long begin, end;
    team.share(layer.desc.cout, kChannelPad, begin, end);
    for (int k = 0; k < pieces; ++k, sums += padded(layer.desc.cout))
        for (long i = begin; i < end; ++i)
            y[i] = k == 0 ? sums[i] : y[i] + sums[i];
}

// Pixels [from, to) and panels [panel_begin, panel_end) of a pointwise layer.
template <class T>
template <class X, class Y>
void Runner<T>::pointwise(const Layer &layer, const Tensors<X, Y> &t, std::ptrdiff_t from, std::ptrdiff_t to,
                          const Y *residual, std::ptrdiff_t residual_ld, int panel_begin, int panel_end) const {
    if (from < to && panel_begin < panel_end)
        multiply<X, Y>(layer, 0, layer.desc.cout, {t.x + from * t.x_ld, t.x_ld, t.y + from * t.y_ld, t.y_ld, 0},
                       to - from, residual ? residual + from * residual_ld : nullptr, residual_ld, panel_begin,
                       panel_end);
}

// `cout` output channels of a pointwise layer from channel `n` on, which begins a panel.
template <class T>
template <class X, class Y>
void Runner<T>::multiply(const Layer &layer, int n, int cout, const Tensors<X, Y> &t, std::ptrdiff_t pixels,
                         const Y *residual, std::ptrdiff_t residual_ld, int panel_begin, int panel_end,
                         const Ahead &ahead) const {
    const Packed &packed = layer.packed;
    const auto run = [&](const auto *weight) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
        Pointwise<X, W, Y> args{t.x,
                                t.x_ld,
                                weight + static_cast<std::ptrdiff_t>(n) * packed.depth,
                                packed.bias + n,
                                residual,
                                residual_ld,
                                t.y,
                                t.y_ld,
                                pixels,
                                layer.desc.cin,
                                cout,
                                panel_begin,
                                panel_end,
                                layer.desc.relu6};
        args.ahead = ahead.begin;
        args.ahead_size = ahead.size;
        call(kernels_, args);
    };
    if (packed.pairs)
        run(static_cast<const bf16 *>(packed.weight));
    else if constexpr (kFloat)
        run(static_cast<const float *>(packed.weight));
}

// All of a pointwise layer, shared by a team.
template <class T>
template <class X, class Y>
void Runner<T>::pointwise(Team &team, const Layer &layer, const Tensors<X, Y> &t, std::ptrdiff_t pixels,
                          const Y *residual, std::ptrdiff_t residual_ld) const {
    const int panels = this->panels(layer);
    const auto part = [&](std::ptrdiff_t from, std::ptrdiff_t to, int panel_begin, int panel_end) {
        pointwise<X, Y>(layer, t, from, to, residual, residual_ld, panel_begin, panel_end);
    };
    const long tile = kernels_.tile_rows, tiles = (pixels + tile - 1) / tile;
    if (tiles % team.size() == 0 || tiles >= 8 * team.size()) {
        long begin, end;
        team.share(pixels, tile, begin, end);
        part(begin, end, 0, panels);
        return;
    }
    // Too few tiles to share evenly (7 x 7 pixels are 3.5 of them): share (panel, tile) pairs by the pixels in them.
    const auto cut = [&](int rank) {
        const long work = panels * pixels * rank / team.size();
        const long panel = work / pixels, from = (work % pixels + tile / 2) / tile * tile;
        return std::pair<long, long>(panel, std::min<long>(from, pixels));
    };
    const auto [panel_begin, from] = cut(team.rank());
    const auto [panel_end, to] = cut(team.rank() + 1);
    if (panel_begin == panel_end) {
        part(from, to, panel_begin, panel_begin + 1);
        return;
    }
    part(from, pixels, panel_begin, panel_begin + 1);
    part(0, pixels, panel_begin + 1, panel_end);
    part(0, to, panel_end, panel_end + 1);
}

// Output rows [begin, end) of the stem. `rows` holds kStemRing padded input rows, filled as they are needed, and one of
// zeros; `loaded` is the last input row in it.
template <class T>
void Runner<T>::stem_rows(const Layer &layer, int image, int begin, int end, int width, float *y, std::ptrdiff_t y_ld,
                          float *rows, int &loaded) const {
    const std::ptrdiff_t size = stem_row(plan_.w);
    float *const zeros = rows + kStemRing * size;
    if (loaded < 0) {
        std::memset(rows, 0, sizeof(float) * (kStemRing + 1) * size); // the padding is zeros and stays so
        loaded = std::max(-1, 2 * begin - 2);
    }
    for (int o = begin; o < end; ++o, y += width * y_ld) {
        for (; loaded < std::min(plan_.h - 1, 2 * o + 1); ++loaded)
            load_row(image, loaded + 1, rows + (loaded + 1) % kStemRing * size);
        StemArgs args{{},
                      planar() ? 2 : 6,
                      static_cast<const float *>(layer.packed.weight),
                      layer.packed.bias,
                      y,
                      y_ld,
                      width,
                      layer.desc.cout,
                      layer.desc.relu6};
        for (int k = 0; k < kStemTaps; ++k) {
            const int c = k / 9, kh = k / 3 % 3, kw = k % 3, h = 2 * o + kh - 1;
            const float *row = h < 0 || h >= plan_.h ? zeros : rows + h % kStemRing * size;
            args.taps[k] = row + (planar() ? c * (plan_.w + 2) + kw : kw * 3 + c);
        }
        kernels_.stem(args);
    }
}

// One input row behind its left pixel of padding: colour after colour, or interleaved where the image is.
template <class T> void Runner<T>::load_row(int image, int row, float *out) const {
    const std::ptrdiff_t at = image * call_.stride_n + row * call_.stride_h;
    if (call_.element == Element::uint8)
        load_row(static_cast<const std::uint8_t *>(call_.x) + at, out);
    else if (call_.element == Element::bf16)
        load_row(static_cast<const bf16 *>(call_.x) + at, out);
    else
        load_row(static_cast<const float *>(call_.x) + at, out);
}

template <class T> template <class X> void Runner<T>::load_row(const X *in, float *out) const {
    const std::ptrdiff_t width = plan_.w;
    if constexpr (std::is_same_v<X, std::uint8_t>) {
        for (std::ptrdiff_t w = 0; w < width; ++w)
            for (int c = 0; c < 3; ++c)
                out[3 * (w + 1) + c] = table_[256 * c + in[w * call_.stride_w + c * call_.stride_c]];
    } else {
        // The rows after the next one are prefetched, which no hardware prefetcher does across their gaps (25 of the
        // stem's 145 us).
        const auto copy = [this](float *to, const X *from, std::ptrdiff_t count) {
            to_floats(to, from, count);
            for (std::ptrdiff_t i = 0; i < count; i += static_cast<std::ptrdiff_t>(kCacheLine / sizeof(X)))
                __builtin_prefetch(from + 2 * call_.stride_h + i);
        };
        if (!planar()) {
            copy(out + 3, in, 3 * width);
            return;
        }
        for (int c = 0; c < 3; ++c) {
            float *line = out + c * (width + 2) + 1;
            const X *from = in + c * call_.stride_c;
            if (call_.stride_w == 1)
                copy(line, from, width);
            else
                for (std::ptrdiff_t w = 0; w < width; ++w)
                    to_floats(line + w, from + w * call_.stride_w, 1);
        }
    }
}

template class Runner<float>;
template class Runner<bf16>;

} // namespace mnv2
