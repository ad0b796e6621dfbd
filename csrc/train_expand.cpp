// The gradients of an expansion whose output nobody keeps: the depthwise layer after it makes rows of it, and of its
// gradient, again.
#include "train_chunks.h"
#include "train_rows.h"

namespace mnv2 {
namespace {

template <class T> struct SharedMemory {
    SharedMemory(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b, const TrainBackward<T> &after)
        : turned(carver, kernels, b.shape.cout, b.dx ? b.shape.cin : 0),
          depthwise(carver, kernels, b.shape.cout, after.expand) {}
    Product<T> turned; // the expansion's weights
    PackedDepthwise<T> depthwise;
};

template <class T> struct OwnMemory {
    OwnMemory(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b, const TrainBackward<T> &after)
        : chunks(carver, kernels, b, b.shape.w), expanded(carver, after.shape, after.expand),
          gradient(carver, kernels, after), dx(carver.take<float>(band_floats(after.shape))) {}
    BackwardChunks<T> chunks;
    ExpandedRows<T> expanded;
    GradientRows<T> gradient;
    float *dx; // a band of the depthwise layer's input gradient
};

} // namespace

template <class T>
void train_expand_backward(const KernelTable &kernels, const TrainBackward<T> &b, const TrainBackward<T> &after,
                           int threads) {
    threads = usable_threads(threads);
    const TrainShape &s = b.shape;
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(s.w) * s.cout;
    const auto make_shared = [&](Carver &carver) { return SharedMemory<T>(carver, kernels, b, after); };
    const auto make_own = [&](Carver &carver) { return OwnMemory<T>(carver, kernels, b, after); };
    const TeamMemory of(threads, make_shared, make_own);
    SharedMemory<T> shared = of.shared();
    shared.depthwise.taps.pack(kernels, static_cast<const float *>(after.weight), s.cout, after.shape.stride == 1);
    parallel(threads, [&](Team &team) {
        if (b.dx)
            shared.turned.pack(team, {static_cast<const T *>(b.weight), 1, s.cin});
        shared.depthwise.pack_expansion(team);
        OwnMemory<T> memory = of.own(team.rank());
        memory.chunks.clear();
        const auto new_image = [&](long image) {
            memory.expanded.new_image(image, &shared.depthwise.expansion);
            memory.gradient.new_image(image, shared.depthwise.taps.blocks());
        };
        each_band(team, after.shape, new_image, [&](long image, int at, int rows) {
            const int first = memory.gradient.first(at), count = memory.gradient.count(at, rows);
            memory.gradient.input(at, rows, memory.dx);
            for (int i = 0; i < count; ++i)
                memory.chunks.run((image * s.h + first + i) * s.w, s.w, memory.dx + i * row,
                                  memory.expanded.at(first + i), shared.turned);
        });
        add_gradients(team, b, memory.chunks, [&](int t) { return of.own(t).chunks; });
    });
}

template void train_expand_backward(const KernelTable &, const TrainBackward<float> &, const TrainBackward<float> &,
                                    int);
template void train_expand_backward(const KernelTable &, const TrainBackward<bf16> &, const TrainBackward<bf16> &, int);

} // namespace mnv2
