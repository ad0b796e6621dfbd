// The backward pass of a 1x1 convolution, or of the stem, which is one over unfolded windows: a chunk of pixels at a
// time goes through all that is to be done with it while it lies in L2.
#pragma once

#include "train_run.h"

namespace mnv2 {

// Inputs of an output's sum.
inline int inputs(const TrainShape &s) { return s.kind == TrainKind::stem ? 9 * s.cin : s.cin; }

// The windows of output pixels [from, from + count), [count][cin][3][3] as torch lays the weights out.
inline void unfold(const TrainShape &s, const float *x, std::ptrdiff_t from, std::ptrdiff_t count, float *rows) {
    const int ho = s.out_h(), wo = s.out_w();
    const std::ptrdiff_t step = s.strides[3];
    for (std::ptrdiff_t p = from; p < from + count; ++p) {
        const int w = static_cast<int>(p % wo) * s.stride - 1, h = static_cast<int>(p / wo % ho) * s.stride - 1;
        const float *line = x + p / wo / ho * s.strides[0] + h * s.strides[2] + w * step;
        const bool inside = w >= 0 && w + 3 <= s.w;
        for (int c = 0; c < s.cin; ++c, line += s.strides[1])
            for (int kh = 0; kh < 3; ++kh, rows += 3) {
                const float *const tap = line + kh * s.strides[2];
                const bool there = h + kh >= 0 && h + kh < s.h;
                if (there && inside) {
                    rows[0] = tap[0];
                    rows[1] = tap[step];
                    rows[2] = tap[2 * step];
                    continue;
                }
                for (int kw = 0; kw < 3; ++kw)
                    rows[kw] = there && w + kw >= 0 && w + kw < s.w ? tap[kw * step] : 0.0f;
            }
    }
}

// One member's memory of the backward pass, and what it does with a chunk of pixels.
class BackwardChunks {
  public:
    BackwardChunks(Carver &carver, const KernelTable &kernels, const TrainBackward &b, int chunk)
        : kernels_(kernels), b_(b), s_(b.shape), depth_(inputs(s_)), chunk_(chunk),
          dz_(carver.take<float>(static_cast<std::size_t>(chunk) * s_.cout)),
          rows_(carver.take<float>(s_.kind == TrainKind::stem ? static_cast<std::size_t>(chunk) * depth_ : 0)),
          input_(carver.take<float>(b.dw ? packed_floats(kernels, depth_, chunk) : 0)),
          dw_(carver.take<float>(b.dw ? static_cast<std::size_t>(s_.cout) * depth_ : 0)), sums_(carver, s_.cin) {}

    void clear() {
        sums_.clear();
        first_ = true;
    }

    // `count` output pixels from `at` on, of which g and z are at hand. `packed`: the weights turned.
    void run(std::ptrdiff_t at, std::ptrdiff_t count, const float *g, const float *z, const float *packed) {
        kernels_.train_gradient(
            {g, s_.cout, z, s_.cout, b_.out, b_.of_g, b_.of_z, b_.constant, dz_, s_.cout, count, s_.cout});
        if (b_.dw)
            weight(at, count);
        if (b_.dx)
            input(at, count, packed);
        first_ = false;
    }

    // After the last chunk: a member without any has gradients too.
    void close() {
        if (first_ && b_.dw)
            std::fill_n(dw_, weights(), 0.0f);
    }

    // To be added to those of the other members.
    const float *dw() const { return dw_; }
    const double *sums() const { return sums_.total(); }
    std::ptrdiff_t weights() const { return static_cast<std::ptrdiff_t>(s_.cout) * depth_; }

  private:
    void weight(std::ptrdiff_t at, std::ptrdiff_t count) {
        const float *x = b_.x + at * s_.cin;
        if (s_.kind == TrainKind::stem) {
            unfold(s_, b_.x, at, count, rows_);
            x = rows_;
        }
        kernels_.train_panels({x, depth_, b_.in, input_, chunk_, count, depth_});
        kernels_.train_weight_gradient({dz_, s_.cout, input_, chunk_, dw_, depth_, count, depth_, s_.cout, !first_});
    }

    void input(std::ptrdiff_t at, std::ptrdiff_t count, const float *packed) {
        const std::ptrdiff_t of_x = at * s_.cin;
        float *const dx = b_.dx + of_x;
        kernels_.pointwise({dz_, s_.cout, packed, nullptr, b_.residual ? b_.residual + of_x : nullptr, s_.cin, dx,
                            s_.cin, count, s_.cout, s_.cin, 0, panels(kernels_, s_.cin), false});
        if (b_.in.scale) {
            kernels_.train_sums({dx, s_.cin, b_.x + of_x, s_.cin, b_.in, b_.in.relu6 ? dx : nullptr, s_.cin, false,
                                 sums_.first, sums_.second, count, s_.cin});
            sums_.add();
        }
    }

    const KernelTable &kernels_;
    const TrainBackward &b_;
    const TrainShape &s_;
    int depth_, chunk_;
    float *dz_;
    float *rows_;  // unfolded
    float *input_; // activated, in panels
    float *dw_;
    ChannelSums sums_;
    bool first_ = true;
};

// Gradients of the weights and sums of the input's, of all members, once each has closed its own. of(rank): a member's.
template <class Of> void add_gradients(Team &team, const TrainBackward &b, BackwardChunks &own, const Of &of) {
    own.close();
    if (b.dw)
        add_parts<float>(team, [&](int t) { return of(t).dw(); }, own.weights(), b.dw);
    if (b.dx && b.sums)
        add_parts<double>(team, [&](int t) { return of(t).sums(); }, 2 * b.shape.cin, b.sums);
}

} // namespace mnv2
