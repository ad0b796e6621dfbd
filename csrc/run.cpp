#include "run.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace mnv2 {
namespace {

constexpr int kMaxPanel = 2 * kChannelPad; // channels, of any instruction set

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
    a.scratch = memory + team.rank() * plan_.scratch;
    return a;
}

template <class T> void Runner<T>::run(Team &team, std::byte *memory, void *features) const {
    // Whole images to every thread, which then never waits; what is left over is shared image by image.
    const int each = call_.n >= plan_.threads ? call_.n / team.size() : 0; // as memory() was told
    if (each > 0) {
        Team alone = Team::solo();
        const Arena own = arena(memory + team.rank() * plan_.arena(1), alone);
        for (int k = 0; k < each; ++k)
            image(alone, own, team.rank() * each + k, features);
        team.sync();
    }
    const Arena together = arena(memory, team);
    for (int k = each * team.size(); k < call_.n; ++k)
        image(team, together, k, features);
    if (steps_.back().form == Step::Form::linear)
        linear(team, static_cast<int>(steps_.size()) - 1,
               static_cast<const T *>(steps_.size() > 1 ? features : call_.x), call_.n);
}

// Every step for one image, but for a linear last one, which runs once for all.
template <class T> void Runner<T>::image(Team &team, const Arena &arena, int image, void *features) const {
    const T *x = nullptr; // the call's own
    for (std::size_t i = 0; i < steps_.size() && steps_[i].form != Step::Form::linear; ++i) {
        const int step = static_cast<int>(i);
        const Ends t = place(step, x, arena.activation[i % 2], image);
        run_step(team, arena, step, t, features);
        team.sync();
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
    else if (by_layers(layers_, s, plan_.steps[step], team.size()))
        block_by_layers(team, arena, step, t);
    else
        block_by_rows(team, arena, step, t);
}

// One output row of a depthwise layer, blocks [block_begin, block_end) of its channels.
template <class T>
void Runner<T>::depthwise_row(const Layer &layer, const Rows &in, long row, T *y, std::ptrdiff_t y_ld, int block_begin,
                              int block_end) const {
    const LayerDesc &d = layer.desc;
    const long h = row * d.stride;
    call(kernels_, Depthwise<T>{{in.at(h - 1), in.at(h), in.at(h + 1)},
                                in.ld,
                                static_cast<const float *>(layer.packed.weight),
                                y,
                                y_ld,
                                in.width,
                                d.stride,
                                d.cout,
                                block_begin,
                                block_end,
                                d.relu6});
}

// One panel of hidden rows [from, to), into the ring.
template <class T>
void Runner<T>::expand_panel(const Layer &layer, const Ends &t, const Rows &ring, float *out, int from, int to,
                             int panel) const {
    const std::ptrdiff_t width = ring.width;
    while (from < to) {
        const int slot = from % ring.ring, rows = std::min(to - from, ring.ring - slot);
        const Tensors<T, float> hidden{t.x + from * width * t.x_ld, t.x_ld, out + slot * width * ring.ld, ring.ld, 0};
        pointwise<T, float>(layer, hidden, 0, rows * width, nullptr, 0, panel, panel + 1);
        from += rows;
    }
}

// Rows [from, to) of a step's input, into the ring of the depthwise layer that follows.
template <class T>
void Runner<T>::widen_rows(const Ends &t, const Rows &ring, float *out, int from, int to, int channels) const {
    const std::ptrdiff_t width = ring.width;
    if constexpr (!kFloat)
        for (; from < to; ++from)
            kernels_.widen({t.x + from * width * t.x_ld, t.x_ld, out + from % ring.ring * width * ring.ld, ring.ld,
                            width, channels});
}

// A strip of output rows for each member; p.rows of them at a time, their hidden rows in a ring.
template <class T> void Runner<T>::block_by_rows(Team &team, const Arena &arena, int step, const Ends &t) const {
    const Step &s = steps_[step];
    const StepPlan &p = plan_.steps[step];
    const Layer &depthwise = layers_[s.depthwise], &project = layers_[s.last];
    const Layer *const produce = s.produce >= 0 ? &layers_[s.produce] : nullptr;
    const bool stem = produce && produce->desc.kind == Kind::stem;
    const int stride = depthwise.desc.stride, ld = padded(depthwise.desc.cin);
    const int blocks = this->blocks(depthwise), per_panel = kernels_.panel / kernels_.lanes;
    float *const input = reinterpret_cast<float *>(arena.scratch); // of the stem
    float *const ring = input + (layers_.front().desc.kind == Kind::stem ? (kStemRing + 1) * stem_row(plan_.w) : 0);
    T *const filtered = reinterpret_cast<T *>(ring + static_cast<std::ptrdiff_t>(p.ring) * p.hidden_w * ld);
    Rows hidden{ring, ld, p.hidden_h, p.hidden_w, p.ring};
    if constexpr (kFloat)
        if (!produce)
            hidden = {t.x, t.x_ld, p.hidden_h, p.hidden_w, p.hidden_h};

    long begin, end;
    team.share(p.ho, 1, begin, end);
    int made = std::max(0, static_cast<int>(begin) * stride - 1); // the next hidden row to make
    int loaded = -1;                                              // the last input row of the stem at hand
    for (int o = static_cast<int>(begin); o < end; o += p.rows) {
        const int rows = std::min(p.rows, static_cast<int>(end) - o);
        const int needed = std::min(p.hidden_h, (o + rows - 1) * stride + 2);
        for (; stem && made < needed; ++made)
            stem_rows(*produce, t.image, made, made + 1, p.hidden_w,
                      ring + static_cast<std::ptrdiff_t>(made % p.ring) * p.hidden_w * ld, ld, input, loaded);
        if (!kFloat && !produce)
            widen_rows(t, hidden, ring, made, needed, depthwise.desc.cin);
        // A panel of channels is expanded and filtered before the next one, its rows still in L1: the depthwise layers
        // of an image took 383 us row by row, 330 so.
        for (int block = 0; block < blocks; block += per_panel) {
            if (produce && !stem)
                expand_panel(*produce, t, hidden, ring, made, needed, block / per_panel);
            for (int r = 0; r < rows; ++r)
                depthwise_row(depthwise, hidden, o + r, filtered + static_cast<std::ptrdiff_t>(r) * p.wo * ld, ld,
                              block, std::min(block + per_panel, blocks));
        }
        made = needed;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(o) * p.wo;
        pointwise<T, T>(project, {filtered, ld, t.y + at * t.y_ld, t.y_ld, 0}, 0,
                        static_cast<std::ptrdiff_t>(rows) * p.wo, project.desc.residual ? t.x + at * t.x_ld : nullptr,
                        t.x_ld, 0, panels(project));
    }
}

// Expand, wait, depthwise, wait, project: each layer shared by the team as its own shape asks.
template <class T> void Runner<T>::block_by_layers(Team &team, const Arena &arena, int step, const Ends &t) const {
    const Step &s = steps_[step];
    const StepPlan &p = plan_.steps[step];
    const Layer &expand = layers_[s.produce], &depthwise = layers_[s.depthwise], &project = layers_[s.last];
    const int ld = padded(depthwise.desc.cin);
    const std::ptrdiff_t in_pixels = static_cast<std::ptrdiff_t>(p.hidden_h) * p.hidden_w;
    const std::ptrdiff_t out_pixels = static_cast<std::ptrdiff_t>(p.ho) * p.wo;

    pointwise<T, float>(team, expand, {t.x, t.x_ld, arena.hidden, ld, 0}, in_pixels, nullptr, 0);
    team.sync();

    const long all_blocks = blocks(depthwise);
    long row_begin = 0, row_end = p.ho, block_begin = 0, block_end = all_blocks;
    if (p.ho % team.size() == 0)
        team.share(p.ho, 1, row_begin, row_end);
    else
        team.share(all_blocks, 1, block_begin, block_end);
    const Rows hidden{arena.hidden, ld, p.hidden_h, p.hidden_w, p.hidden_h};
    for (long row = row_begin; row < row_end; ++row) {
        depthwise_row(depthwise, hidden, row, arena.filtered + row * p.wo * ld, ld, static_cast<int>(block_begin),
                      static_cast<int>(block_end));
    }
    team.sync();

    pointwise<T, T>(team, project, {arena.filtered, ld, t.y, t.y_ld, 0}, out_pixels,
                    project.desc.residual ? t.x : nullptr, t.x_ld);
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
    Rows in{rows, padded(d.cin), p.h, p.w, p.ring};
    if constexpr (kFloat)
        in = {t.x, t.x_ld, p.h, p.w, p.h};
    int made = std::max(0, static_cast<int>(begin) * d.stride - 1); // the next row to widen
    for (int o = static_cast<int>(begin); o < end; ++o) {
        const int needed = std::min(p.h, o * d.stride + 2);
        if (!kFloat)
            widen_rows(t, in, rows, made, needed, d.cin);
        made = needed;
        depthwise_row(layer, in, o, t.y + static_cast<std::ptrdiff_t>(o) * p.wo * t.y_ld, t.y_ld, 0, blocks(layer));
    }
}

// The last 1x1 layer a panel of channels at a time, summed at once: its output, 250 KB an image, is never written.
template <class T> void Runner<T>::head(Team &team, const Arena &arena, int step, const Ends &t, void *features) const {
    const StepPlan &p = plan_.steps[step];
    const Layer &layer = layers_[steps_[step].last];
    const LayerDesc &d = layer.desc;
    const std::ptrdiff_t pixels = static_cast<std::ptrdiff_t>(p.h) * p.w;
    float *const tile = reinterpret_cast<float *>(arena.scratch);
    long begin, end;
    team.share(panels(layer), 1, begin, end);
    for (long panel = begin; panel < end; ++panel) {
        const int n = static_cast<int>(panel) * kernels_.panel, channels = std::min(kernels_.panel, d.cout - n);
        float sum[kMaxPanel];
        double total[kMaxPanel] = {}; // of the chunks: one long float32 sum would lose digits on a large map
        for (std::ptrdiff_t at = 0; at < pixels; at += kPoolChunk) {
            const std::ptrdiff_t chunk = std::min<std::ptrdiff_t>(kPoolChunk, pixels - at);
            multiply<T, float>(layer, n, channels, {t.x + at * t.x_ld, t.x_ld, tile, kernels_.panel, 0}, chunk, nullptr,
                               0, 0, 1);
            kernels_.pool({tile, kernels_.panel, sum, chunk, channels});
            for (int c = 0; c < channels; ++c)
                total[c] += sum[c];
        }
        for (int c = 0; c < channels; ++c)
            sum[c] = static_cast<float>(total[c] / static_cast<double>(pixels));
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t.image) * d.cout + n;
        if (kFloat || steps_.back().form == Step::Form::head)
            std::memcpy(static_cast<float *>(features) + at, sum, sizeof(float) * channels);
        else
            kernels_.narrow({sum, 0, static_cast<bf16 *>(features) + at, 0, 1, channels});
    }
}

template <class T> void Runner<T>::linear(Team &team, int step, const T *x, int images) const {
    const Layer &layer = layers_[steps_[step].last];
    const LayerDesc &d = layer.desc;
    pointwise<T, float>(team, layer, {x, d.cin, static_cast<float *>(call_.y), d.cout, 0}, images, nullptr, 0);
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
                         const Y *residual, std::ptrdiff_t residual_ld, int panel_begin, int panel_end) const {
    const Packed &packed = layer.packed;
    const auto run = [&](const auto *weight) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
        call(kernels_, Pointwise<X, W, Y>{t.x, t.x_ld, weight + static_cast<std::ptrdiff_t>(n) * packed.depth,
                                          packed.bias + n, residual, residual_ld, t.y, t.y_ld, pixels, layer.desc.cin,
                                          cout, panel_begin, panel_end, layer.desc.relu6});
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
