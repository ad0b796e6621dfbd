// 1x1 convolutions and the stem, which is one over unfolded windows: a chunk of pixels at a time goes through all that
// is to be done with it while it lies in L2.
#include "train_chunks.h"

namespace mnv2 {
namespace {

struct ForwardMemory {
    ForwardMemory(Carver &carver, const TrainForward &f, int chunk)
        : input(carver.take<float>(static_cast<std::size_t>(chunk) * inputs(f.shape))),
          z(carver.take<float>(f.z ? 0 : static_cast<std::size_t>(chunk) * f.shape.cout)), sums(carver, f.shape.cout) {}
    float *input;
    float *z; // of the chunk at hand, where nobody keeps it
    ChannelSums sums;
};

} // namespace

void train_gemm_forward(const KernelTable &kernels, const TrainForward &f, int threads) {
    const TrainShape &s = f.shape;
    const int depth = inputs(s), chunk = chunk_pixels(depth + s.cout);
    const std::ptrdiff_t pixels = s.out_pixels();
    const auto shared = [&](Carver &carver) { return carver.take<float>(packed_floats(kernels, s.cout, depth)); };
    const auto own = [&](Carver &carver) { return ForwardMemory(carver, f, chunk); };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    parallel(threads, [&](Team &team) {
        Carver carver(scratch.data());
        float *const packed = shared(carver);
        pack_shared(team, kernels, {f.weight, depth, 1}, s.cout, depth, packed);
        ForwardMemory memory = of(team.rank());
        memory.sums.clear();
        long begin, end;
        team.share(static_cast<long>(pixels), kernels.tile_rows, begin, end);
        for (std::ptrdiff_t at = begin; at < end; at += chunk) {
            const std::ptrdiff_t count = std::min<std::ptrdiff_t>(chunk, end - at);
            const float *x = f.x + at * s.cin;
            if (s.kind == TrainKind::stem)
                unfold(s, f.x, at, count, memory.input);
            else if (f.in.scale)
                kernels.train_activate({x, s.cin, f.in, nullptr, 0, memory.input, s.cin, count, s.cin});
            if (s.kind == TrainKind::stem || f.in.scale)
                x = memory.input;
            float *const z = f.z ? f.z + at * s.cout : memory.z;
            kernels.pointwise({x, depth, packed, nullptr, nullptr, 0, z, s.cout, count, depth, s.cout, 0,
                               panels(kernels, s.cout), false});
            if (f.sums) {
                kernels.train_moments({z, s.cout, memory.sums.first, memory.sums.second, count, s.cout});
                memory.sums.add_moments(z, count);
            }
        }
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of(t).sums.total(); }, 2 * s.cout, f.sums);
    });
}

void train_gemm_backward(const KernelTable &kernels, const TrainBackward &b, int threads) {
    const TrainShape &s = b.shape;
    const int depth = inputs(s), chunk = chunk_pixels(s.cout + 2 * static_cast<std::ptrdiff_t>(depth));
    const auto shared = [&](Carver &carver) {
        return carver.take<float>(b.dx ? packed_floats(kernels, s.cin, s.cout) : 0);
    };
    const auto own = [&](Carver &carver) { return BackwardChunks(carver, kernels, b, chunk); };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    parallel(threads, [&](Team &team) {
        Carver carver(scratch.data());
        float *const packed = shared(carver);
        if (b.dx)
            pack_shared(team, kernels, {b.weight, 1, s.cin}, s.cin, s.cout, packed);
        BackwardChunks chunks = of(team.rank());
        chunks.clear();
        long begin, end;
        team.share(static_cast<long>(s.out_pixels()), kernels.tile_rows, begin, end);
        for (std::ptrdiff_t at = begin; at < end; at += chunk)
            chunks.run(at, std::min<std::ptrdiff_t>(chunk, end - at), b.g + at * s.cout, b.z + at * s.cout, packed);
        add_gradients(team, b, chunks, of);
    });
}

} // namespace mnv2
