// The gradients of an expansion whose output nobody keeps: the depthwise layer after it makes rows of it, and of its
// gradient, again.
#include <utility>

#include "train_chunks.h"
#include "train_rows.h"

namespace mnv2 {
namespace {

// Makes g and z of an expansion's output, a band of rows at a time, from the depthwise layer after it.
struct AfterMemory {
    AfterMemory(Carver &carver, const KernelTable &kernels, const TrainBackward &after)
        : input(carver, kernels, after.shape, nullptr, {}, after.expand), gradient(carver, kernels, after),
          dx(carver.take<float>(band_floats(after.shape))) {}
    InputRows input;
    GradientRows gradient;
    float *dx;
};

} // namespace

void train_expand_backward(const KernelTable &kernels, const TrainBackward &b, const TrainBackward &after,
                           int threads) {
    threads = usable_threads(threads);
    const TrainShape &s = b.shape;
    const int width = s.w, chunk = 2 * width; // pixels of a band
    const auto shared = [&](Carver &carver) {
        float *const packed = carver.take<float>(b.dx ? packed_floats(kernels, s.cin, s.cout) : 0);
        return std::make_pair(packed, PackedDepthwise(carver, kernels, s.cout, after.expand));
    };
    const auto own = [&](Carver &carver) {
        BackwardChunks chunks(carver, kernels, b, chunk);
        return std::make_pair(chunks, AfterMemory(carver, kernels, after));
    };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    Carver carver(scratch.data());
    auto [packed, common] = shared(carver);
    common.taps.pack(kernels, after.weight, s.cout, after.shape.stride == 1);
    parallel(threads, [&, packed = packed, &common = common](Team &team) {
        if (b.dx)
            pack_shared(team, kernels, {b.weight, 1, s.cin}, s.cin, s.cout, packed);
        common.pack_expansion(team);
        auto [chunks, memory] = of(team.rank());
        chunks.clear();
        const auto new_image = [&, &memory = memory](long image) {
            memory.input.new_image(image, common.expand);
            memory.gradient.new_image(image, common.taps.blocks());
        };
        each_band(team, after.shape, new_image, [&, &memory = memory, &chunks = chunks](long image, int row, int rows) {
            const int first = memory.gradient.first(row), count = memory.gradient.count(row, rows);
            memory.gradient.input(row, rows, memory.dx);
            for (int i = 0; i < count; ++i) {
                const std::ptrdiff_t at = (image * s.h + first + i) * width;
                chunks.run(at, width, memory.dx + i * memory.input.row(), memory.input.raw(first + i), packed);
            }
        });
        add_gradients(team, b, chunks, [&](int t) { return of(t).first; });
    });
}

} // namespace mnv2
