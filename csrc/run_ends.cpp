// The ends of a network: the stem's rows from the caller's image; the head, its pooled features and the classifier.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "run_pointwise.h"

namespace mnv2 {
namespace {

void to_floats(float *to, const float *from, std::ptrdiff_t count) { std::memcpy(to, from, sizeof(float) * count); }
void to_floats(float *to, const bf16 *from, std::ptrdiff_t count) {
    for (std::ptrdiff_t i = 0; i < count; ++i)
        to[i] = to_float(from[i]);
}

} // namespace

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
    const bool classifies = plan_.head_classifies(call_.n);
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

template void Runner<float>::stem_rows(const Layer &, int, int, int, int, float *, std::ptrdiff_t, float *,
                                       int &) const;
template void Runner<float>::head(Team &, const Arena &, int, const Ends &, void *) const;
template void Runner<float>::linear(Team &, int, const float *, int) const;
template void Runner<bf16>::stem_rows(const Layer &, int, int, int, int, float *, std::ptrdiff_t, float *, int &) const;
template void Runner<bf16>::head(Team &, const Arena &, int, const Ends &, void *) const;
template void Runner<bf16>::linear(Team &, int, const bf16 *, int) const;

} // namespace mnv2
