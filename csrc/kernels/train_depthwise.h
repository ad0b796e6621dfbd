// Gradients of the 3x3 depthwise convolution, a row at a time. That of a stride-1 layer's input is depthwise.h's
// convolution with the taps turned round.
#pragma once

namespace mnv2::MNV2_ISA {
namespace {

// The nine sums of a block of channels over one output row, for the input rows begin..end-1 of its window that are
// inside the image.
template <int begin, int end, int S, class V> class DepthwiseWeightBlock {
  public:
    DepthwiseWeightBlock(const DepthwiseWeightArgs &a, int c, const V &vector)
        : ld_(a.x_ld), dz_(a.dz + c), dz_ld_(a.dz_ld), vector_(vector) {
#pragma GCC unroll 3
        for (int i = begin; i < end; ++i)
            rows_[i] = a.rows[i] + c;
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i)
            sum_[i] = zero();
    }

    // What N outputs from column `o` on add; columns kw0..kw1-1 of their windows are inside the image.
    template <int N, int kw0, int kw1> inline __attribute__((always_inline)) void outputs(std::ptrdiff_t o) {
        Vec d[N];
#pragma GCC unroll 2
        for (int i = 0; i < N; ++i)
            d[i] = vector_.get(dz_ + (o + i) * dz_ld_);
#pragma GCC unroll 3
        for (int row = begin; row < end; ++row) {
            const float *x = rows_[row] + (o * S - 1 + kw0) * ld_;
#pragma GCC unroll 8
            for (int i = kw0; i < (N - 1) * S + kw1; ++i, x += ld_) {
                const Vec column = vector_.get(x);
#pragma GCC unroll 2
                for (int k = 0; k < N; ++k) {
                    const int kw = i - k * S;
                    if (kw >= 0 && kw < 3)
                        sum_[3 * row + kw] = fma(column, d[k], sum_[3 * row + kw]);
                }
            }
        }
    }

    void run(int width, float *dw) {
        if (width == 1) {
            outputs<1, 1, 2>(0);
        } else {
            const std::ptrdiff_t last = (width - 1) / S + 1;
            const std::ptrdiff_t inside = (width - 2 + S) / S; // outputs before this one have a right column
            outputs<1, 1, 3>(0);
            std::ptrdiff_t o = 1;
            for (; o + 2 <= inside; o += 2)
                outputs<2, 0, 3>(o);
            for (; o < inside; ++o)
                outputs<1, 0, 3>(o);
            if (o < last)
                outputs<1, 0, 2>(o);
        }
#pragma GCC unroll 9
        for (int i = 3 * begin; i < 3 * end; ++i)
            store(dw + i * kLanes, add(load(dw + i * kLanes), sum_[i]));
    }

  private:
    const float *rows_[3];
    std::ptrdiff_t ld_;
    const float *dz_;
    std::ptrdiff_t dz_ld_;
    V vector_;
    Vec sum_[9];
};

template <int S> void depthwise_weight(const DepthwiseWeightArgs &a) {
    each_vector(a.channels, [&](int c, auto vector) {
        using V = decltype(vector);
        float *const dw = a.dw + static_cast<std::ptrdiff_t>(c) * 9;
        if (a.rows[0] && a.rows[2])
            DepthwiseWeightBlock<0, 3, S, V>(a, c, vector).run(a.width, dw);
        else if (a.rows[2])
            DepthwiseWeightBlock<1, 3, S, V>(a, c, vector).run(a.width, dw);
        else if (a.rows[0])
            DepthwiseWeightBlock<0, 2, S, V>(a, c, vector).run(a.width, dw);
        else
            DepthwiseWeightBlock<1, 2, S, V>(a, c, vector).run(a.width, dw);
    });
}

void train_depthwise_weight(const DepthwiseWeightArgs &a) {
    if (a.stride == 1)
        depthwise_weight<1>(a);
    else
        depthwise_weight<2>(a);
}

// Even columns are in the middle of one window, odd ones at the end of one and the beginning of the next. `upper` and
// `lower`: three taps of the window's row that meets each of the two rows of dz.
template <bool kLower, class V>
inline void depthwise_input_row(const DepthwiseInputArgs &a, int c, const V &vector, const float *upper,
                                const float *lower) {
    const int outputs = (a.width - 1) / 2 + 1;
    Vec w[6];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
        w[i] = load(upper + i * kLanes);
        w[3 + i] = kLower ? load(lower + i * kLanes) : zero();
    }
    const float *u = a.upper + c, *l = kLower ? a.lower + c : nullptr;
    float *dx = a.dx + c;
    const Vec none = zero();
    Vec here = vector.get(u), here_lower = kLower ? vector.get(l) : none;
    for (int o = 0; o < outputs; ++o, dx += 2 * a.dx_ld) {
        const bool more = o + 1 < outputs;
        const Vec next = more ? vector.get(u += a.dz_ld) : none;
        const Vec next_lower = kLower && more ? vector.get(l += a.dz_ld) : none;
        Vec even = fma(here, w[1], none);
        if (kLower)
            even = fma(here_lower, w[4], even);
        vector.put(dx, even);
        if (2 * o + 1 < a.width) {
            Vec odd = fma(here, w[2], none);
            if (more)
                odd = fma(next, w[0], odd);
            if (kLower)
                odd = fma(here_lower, w[5], odd);
            if (kLower && more)
                odd = fma(next_lower, w[3], odd);
            vector.put(dx + a.dx_ld, odd);
        }
        here = next;
        here_lower = next_lower;
    }
}

void train_depthwise_input(const DepthwiseInputArgs &a) {
    each_vector(a.channels, [&](int c, auto vector) {
        const float *const w = a.weight + static_cast<std::ptrdiff_t>(c) * kDepthwiseBlock;
        const float *const upper = w + (a.odd ? 6 : 3) * kLanes;
        if (a.lower)
            depthwise_input_row<true>(a, c, vector, upper, w);
        else
            depthwise_input_row<false>(a, c, vector, upper, nullptr);
    });
}

} // namespace
} // namespace mnv2::MNV2_ISA
