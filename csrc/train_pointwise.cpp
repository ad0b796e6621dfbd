// 1x1 convolutions of a training step.
#include "train_chunks.h"

namespace mnv2 {
namespace {

template <class T> struct ForwardMemory {
    ForwardMemory(Carver &carver, const TrainForward<T> &f, int chunk)
        : input(carver.take<T>(f.in.scale ? static_cast<std::size_t>(chunk) * f.shape.cin : 0)),
          z(carver.take<float>(f.z && std::is_same_v<T, float> ? 0 : static_cast<std::size_t>(chunk) * f.shape.cout)),
          sums(carver, f.shape.cout) {}
    T *input;
    float *z; // of the chunk at hand, before it is rounded, or where nobody keeps it
    ChannelSums sums;
};

} // namespace

template <class T> void train_pointwise_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads) {
    const TrainShape &s = f.shape;
    const int chunk = chunk_pixels(static_cast<std::ptrdiff_t>(sizeof(T)) * s.cin +
                                       static_cast<std::ptrdiff_t>(sizeof(float)) * s.cout,
                                   tile_rows<T>(kernels));
    const auto make_shared = [&](Carver &carver) { return Product<T>(carver, kernels, s.cin, s.cout); };
    const auto make_own = [&](Carver &carver) { return ForwardMemory<T>(carver, f, chunk); };
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
            T *const z = f.z ? f.z + at * s.cout : nullptr;
            float *const made = z ? in_float(z, memory.z) : memory.z;
            weights.sums(x, count, made);
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
        each_chunk(team, kernels, s, chunk, [&](std::ptrdiff_t at, std::ptrdiff_t count) {
            chunks.run(at, count, b.g + at * s.cout, b.z + at * s.cout, turned);
        });
        add_gradients(team, b, chunks, [&](int t) { return of.own(t); });
    });
}

template void train_pointwise_forward(const KernelTable &, const TrainForward<float> &, int);
template void train_pointwise_forward(const KernelTable &, const TrainForward<bf16> &, int);
template void train_pointwise_backward(const KernelTable &, const TrainBackward<float> &, int);
template void train_pointwise_backward(const KernelTable &, const TrainBackward<bf16> &, int);

} // namespace mnv2
