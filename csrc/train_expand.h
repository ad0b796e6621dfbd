// An expansion whose output nobody keeps, beside the depthwise layer that makes rows of it: its weight with the norm's
// scale, and its gradients.
#pragma once

#include <cstring>

#include "train_weight.h"

namespace mnv2 {

// Rounds to the nearest, of two as near to the even one; a NaN stays.
inline void store_rounded(float &to, double value) { to = static_cast<float>(value); }
inline void store_rounded(bf16 &to, double value) {
    const float a = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    const std::uint32_t half = a == a ? 0x7fff + (bits >> 16 & 1) : 0;
    to.bits = static_cast<std::uint16_t>((bits + half) >> 16 | (a == a ? 0 : 0x40));
}

// An expansion's weight times its norm's scale.
template <class T> T scaled(T weight, float scale) {
    T to;
    store_rounded(to, static_cast<double>(to_float(weight)) * scale);
    return to;
}
template <class T> void scale_weight(const TrainExpand<T> &expand, const float *scale, int channels, T *out) {
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(channels) * expand.cin; ++i)
        out[i] = scaled(expand.weight[i], scale[i / expand.cin]);
}

// Subtracts a number from each channel: what reads a tensor through a norm.
class Center {
  public:
    Center(Carver &carver, int channels)
        : scale_(carver.take<float>(channels)), shift_(carver.take<float>(channels)), channels_(channels) {}

    // `mean`: or null for zeros.
    void set(const double *mean) {
        std::fill_n(scale_, channels_, 1.0f);
        for (int c = 0; c < channels_; ++c)
            shift_[c] = mean ? -static_cast<float>(mean[c]) : 0.0f;
    }
    Norm norm() const { return {nullptr, scale_, shift_, false}; }
    float of(int c) const { return -shift_[c]; }

  private:
    float *scale_, *shift_;
    int channels_;
};

// What a team shares.
template <class T> class ExpandWeights {
  public:
    ExpandWeights(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b)
        : center(carver, inputs(b)), turned(carver, kernels, b.shape.cin, dx_channels(b)), b_(b),
          scaled_(carver.take<T>(static_cast<std::size_t>(b.shape.cin) * dx_channels(b))) {}

    // By one member before all of them pack.
    void scale() {
        if (!b_.expanded)
            return;
        const TrainExpand<T> &e = *b_.expand;
        center.set(e.moments);
        if (b_.expanded->dx)
            scale_weight(e, b_.in.scale, b_.shape.cin, scaled_);
    }
    void pack(Team &team) {
        if (b_.expanded && b_.expanded->dx)
            turned.pack(team, {scaled_, 1, b_.expand->cin});
    }

    Center center; // of the expansion's input
    Product<T> turned;

  private:
    static int inputs(const TrainBackward<T> &b) { return b.expanded ? b.expand->cin : 0; }
    static int dx_channels(const TrainBackward<T> &b) { return b.expanded && b.expanded->dx ? b.expand->cin : 0; }

    const TrainBackward<T> &b_;
    T *scaled_; // weights times the norm's scale
};

// One member's part.
template <class T> class ExpandGradient {
  public:
    ExpandGradient(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b, int pixels)
        : kernels_(kernels), b_(b), c_(b.shape.cin),
          gradient_(carver, kernels, has_dw(b) ? b.expand->cin : 0, has_dw(b) ? c_ : 0, pixels),
          rounded_(carver.take<T>(b.expanded && std::is_same_v<T, bf16> ? static_cast<std::size_t>(pixels) * c_ : 0)) {}

    void clear() { first_ = true; }

    // `count` pixels from `at` on, of which the masked gradient is at hand.
    void add(const float *g, std::ptrdiff_t at, std::ptrdiff_t count, const ExpandWeights<T> &weights) {
        const TrainExpandGradient &to = *b_.expanded;
        if (!to.dx && !to.dw)
            return;
        const int cin = b_.expand->cin;
        const T *const x = b_.expand->x + at * cin, *const rows = in_type(g, count, rounded_);
        if (to.dw)
            gradient_.add(rows, x, weights.center.norm(), count, first_);
        if (to.dx)
            weights.turned.sums(rows, count, to.dx + at * cin);
        first_ = false;
    }

    // After the last one: a member without any has gradients too.
    void close() {
        if (first_)
            gradient_.clear();
    }
    const WeightGradient<T> &gradient() const { return gradient_; }

  private:
    static bool has_dw(const TrainBackward<T> &b) { return b.expanded && b.expanded->dw; }
    const float *in_type(const float *g, std::ptrdiff_t, float *) { return g; }
    const bf16 *in_type(const float *g, std::ptrdiff_t count, bf16 *to) {
        kernels_.narrow({g, c_, to, c_, count, c_});
        return to;
    }

    const KernelTable &kernels_;
    const TrainBackward<T> &b_;
    int c_;
    WeightGradient<T> gradient_;
    T *rounded_;
    bool first_ = true;
};

} // namespace mnv2
