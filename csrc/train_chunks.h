// The backward pass of a 1x1 convolution: a chunk of pixels at a time goes through all that is to be done with it while
// it lies in L2.
#pragma once

#include "train_weight.h"

namespace mnv2 {

// One member's memory, and what it does with a chunk.
template <class T> class BackwardChunks {
  public:
    BackwardChunks(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b, int chunk)
        : kernels_(kernels), b_(b), s_(b.shape), dz_(carver.take<T>(static_cast<std::size_t>(chunk) * s_.cout)),
          sums_(carver, s_.cin), gradient_(carver, kernels, b.dw ? s_.cin : 0, b.dw ? s_.cout : 0, chunk) {
        const bool rounds = std::is_same_v<T, bf16> && b.dx && b.in.scale;
        dx_ = carver.take<float>(rounds ? static_cast<std::size_t>(chunk) * s_.cin : 0);
    }

    void clear() {
        sums_.clear();
        first_ = true;
    }

    // `count` pixels from `at` on, of which g and z are at hand. `weights`: turned.
    template <class G>
    void run(std::ptrdiff_t at, std::ptrdiff_t count, const G *g, const G *z, const Product<T> &weights) {
        const std::ptrdiff_t of_x = at * s_.cin;
        const T *const x = static_cast<const T *>(b_.x) + of_x;
        mnv2::run(kernels_, GradientOf<G, G, T>{g, s_.cout, z, s_.cout, b_.out, b_.of_g, b_.of_z, b_.constant, dz_,
                                                s_.cout, count, s_.cout});
        if (b_.dw)
            gradient_.add(dz_, x, b_.in, count, first_);
        if (b_.dx)
            input(x, b_.dx + of_x, b_.residual ? b_.residual + of_x : nullptr, count, weights);
        first_ = false;
    }

    // After the last chunk: a member without any has gradients too.
    void close() {
        if (first_)
            gradient_.clear();
    }

    // To be added to those of the other members.
    const WeightGradient<T> &gradient() const { return gradient_; }
    const double *sums() const { return sums_.total(); }

  private:
    void input(const T *x, T *dx, const T *residual, std::ptrdiff_t count, const Product<T> &weights) {
        if (!b_.in.scale) {
            weights.run(dz_, count, residual, dx);
            return;
        }
        float *const made = in_float(dx, dx_);
        weights.sums(dz_, count, made);
        T *const masked = b_.in.relu6 || std::is_same_v<T, bf16> ? dx : nullptr;
        mnv2::run(kernels_, Sums<float, T>{made, s_.cin, x, s_.cin, b_.in, masked, s_.cin, false, sums_.first,
                                           sums_.second, count, s_.cin});
        sums_.add();
    }

    const KernelTable &kernels_;
    const TrainBackward<T> &b_;
    const TrainShape &s_;
    T *dz_;
    float *dx_; // before it is rounded
    ChannelSums sums_;
    WeightGradient<T> gradient_;
    bool first_ = true;
};

// Gradients of the weights and sums of the input's, of all members, once each has closed its own. of(rank): a member's.
template <class T, class Of>
void add_gradients(Team &team, const TrainBackward<T> &b, BackwardChunks<T> &own, const Of &of) {
    const TrainShape &s = b.shape;
    own.close();
    if (b.dw)
        add_weights(team, [&](int t) { return of(t).gradient(); }, s.cin, s.cout, b.dw);
    if (b.dx && b.sums)
        add_parts<double>(team, [&](int t) { return of(t).sums(); }, 2 * s.cin, b.sums);
}

} // namespace mnv2
