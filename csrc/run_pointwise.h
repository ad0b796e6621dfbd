// The 1x1 layers of a step: parts of one, and the whole of one shared by a team.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "run.h"

namespace mnv2 {

// What a kernel of the table takes says which one it is.
inline void call(const KernelTable &kernels, const Pointwise<float> &args) { kernels.pointwise(args); }
inline void call(const KernelTable &kernels, const Pointwise<bf16> &args) { kernels.pointwise_bf16(args); }
inline void call(const KernelTable &kernels, const Pointwise<bf16, bf16, float> &args) {
    kernels.pointwise_bf16_float(args);
}
inline void call(const KernelTable &kernels, const Pointwise<float, bf16, float> &args) {
    kernels.pointwise_mixed(args);
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

} // namespace mnv2
