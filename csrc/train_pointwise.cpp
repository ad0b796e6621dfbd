// 1x1 convolutions of a training step.
#include "train_weight.h"

namespace mnv2 {
namespace {

template <class T> struct ForwardMemory {
    ForwardMemory(Carver &carver, const KernelTable &kernels, const TrainForward<T> &f, int chunk)
        : input(carver.take<T>(f.in.scale ? static_cast<std::size_t>(chunk) * f.shape.cin : 0)),
          z(carver.take<float>(std::is_same_v<T, float> ? 0 : static_cast<std::size_t>(chunk) * f.shape.cout)),
          sums(carver, kernels, f.shape.cout) {}
    T *input;
    float *z; // of the chunk at hand, before it is rounded
    ChannelSums sums;
};

// One member's backward pass: a chunk of pixels at a time goes through all that is to be done with it while it lies in
// L2.
template <class T> class BackwardChunks {
  public:
    BackwardChunks(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b, int chunk)
        : kernels_(kernels), b_(b), s_(b.shape), dz_(carver.take<T>(static_cast<std::size_t>(chunk) * s_.cout)),
          sums_(carver, kernels, s_.cin), gradient_(carver, kernels, b.dw ? s_.cin : 0, b.dw ? s_.cout : 0, chunk) {
        const bool rounds = std::is_same_v<T, bf16> && b.dx && b.in.scale;
        dx_ = carver.take<float>(rounds ? static_cast<std::size_t>(chunk) * s_.cin : 0);
    }

    void clear() {
        sums_.clear();
        first_ = true;
    }

    // `count` pixels from `at` on. `weights`: turned.
    void run(std::ptrdiff_t at, std::ptrdiff_t count, const Product<T> &weights) {
        const std::ptrdiff_t of_x = at * s_.cin, of_z = at * s_.cout;
        const T *const x = static_cast<const T *>(b_.x) + of_x;
        mnv2::run(kernels_, GradientOf<T, T, T>{b_.g + of_z, s_.cout, b_.z + of_z, s_.cout, b_.out, b_.of_g, b_.of_z,
                                                b_.constant, dz_, s_.cout, count, s_.cout});
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
        weights.sums_of_chunk(dz_, count, made);
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

} // namespace

template <class T> void train_pointwise_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads) {
    const TrainShape &s = f.shape;
    const int chunk = chunk_pixels(static_cast<std::ptrdiff_t>(sizeof(T)) * s.cin +
                                       static_cast<std::ptrdiff_t>(sizeof(float)) * s.cout,
                                   tile_rows<T>(kernels));
    const auto make_shared = [&](Carver &carver) { return Product<T>(carver, kernels, s.cin, s.cout); };
    const auto make_own = [&](Carver &carver) { return ForwardMemory<T>(carver, kernels, f, chunk); };
    const TeamMemory of(threads, make_shared, make_own);
    parallel(threads, [&](Team &team) {
        Product<T> weights = of.shared();
        weights.pack(team, {static_cast<const T *>(f.weight), s.cin, 1});
        ForwardMemory<T> memory = of.own(team.rank());
        memory.sums.clear();
        each_chunk(team, kernels, s, chunk, [&](std::ptrdiff_t at, std::ptrdiff_t count) {
            const T *x = static_cast<const T *>(f.x) + at * s.cin;
            if (f.in.scale) {
                run(kernels, Activate<T, T>{x, s.cin, f.in, nullptr, 0, memory.input, s.cin, count, s.cin});
                x = memory.input;
            }
            T *const z = f.z + at * s.cout;
            float *const made = in_float(z, memory.z);
            weights.sums_of_chunk(x, count, made);
            keep(kernels, f, memory.sums, made, count, z);
        });
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of.own(t).sums.total(); }, 2 * s.cout, f.sums);
    });
}

template <class T> void train_pointwise_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads) {
    const TrainShape &s = b.shape;
    const int chunk =
        chunk_pixels(static_cast<std::ptrdiff_t>(sizeof(T)) * (s.cout + 2 * static_cast<std::ptrdiff_t>(s.cin)),
                     tile_rows<T>(kernels));
    const auto make_shared = [&](Carver &carver) { return Product<T>(carver, kernels, s.cout, b.dx ? s.cin : 0); };
    const auto make_own = [&](Carver &carver) { return BackwardChunks<T>(carver, kernels, b, chunk); };
    const TeamMemory of(threads, make_shared, make_own);
    parallel(threads, [&](Team &team) {
        Product<T> turned = of.shared();
        if (b.dx)
            turned.pack(team, {static_cast<const T *>(b.weight), 1, s.cin});
        BackwardChunks<T> chunks = of.own(team.rank());
        chunks.clear();
        each_chunk(team, kernels, s, chunk,
                   [&](std::ptrdiff_t at, std::ptrdiff_t count) { chunks.run(at, count, turned); });
        chunks.close();
        if (b.dw)
            add_weights(team, [&](int t) { return of.own(t).gradient(); }, s.cin, s.cout, b.dw);
        if (b.dx && b.sums)
            add_parts<double>(team, [&](int t) { return of.own(t).sums(); }, 2 * s.cin, b.sums);
    });
}

template void train_pointwise_forward(const KernelTable &, const TrainForward<float> &, int);
template void train_pointwise_forward(const KernelTable &, const TrainForward<bf16> &, int);
template void train_pointwise_backward(const KernelTable &, const TrainBackward<float> &, int);
template void train_pointwise_backward(const KernelTable &, const TrainBackward<bf16> &, int);

} // namespace mnv2
