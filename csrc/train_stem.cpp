// The stem of a training step: a 1x1 convolution over unfolded windows, a chunk of pixels at a time, in float whatever
// its output is rounded to.
#include "train_weight.h"

namespace mnv2 {
namespace {

// The windows of output pixels [from, from + count), [count][cin][3][3] as torch lays the weights out.
void unfold(const TrainShape &s, const float *x, std::ptrdiff_t from, std::ptrdiff_t count, float *rows) {
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

// Inputs of an output's sum.
int window(const TrainShape &s) { return 9 * s.cin; }

int stem_chunk(const KernelTable &kernels, const TrainShape &s) {
    return chunk_pixels(static_cast<std::ptrdiff_t>(sizeof(float)) * (2 * window(s) + s.cout), kernels.tile_rows);
}

template <class T> struct ForwardMemory {
    ForwardMemory(Carver &carver, const KernelTable &kernels, const TrainShape &s, int chunk)
        : rows(carver.take<float>(static_cast<std::size_t>(chunk) * window(s))),
          z(carver.take<float>(std::is_same_v<T, float> ? 0 : static_cast<std::size_t>(chunk) * s.cout)),
          sums(carver, kernels, s.cout) {}
    float *rows;
    float *z; // before it is rounded
    ChannelSums sums;
};

struct BackwardMemory {
    BackwardMemory(Carver &carver, const KernelTable &kernels, const TrainShape &s, int chunk)
        : rows(carver.take<float>(static_cast<std::size_t>(chunk) * window(s))),
          dz(carver.take<float>(static_cast<std::size_t>(chunk) * s.cout)),
          gradient(carver, kernels, window(s), s.cout, chunk) {}
    float *rows, *dz;
    WeightGradient<float> gradient;
};

} // namespace

template <class T> void train_stem_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads) {
    const TrainShape &s = f.shape;
    const float *const x = static_cast<const float *>(f.x);
    const int chunk = stem_chunk(kernels, s);
    const auto make_shared = [&](Carver &carver) { return Product<float>(carver, kernels, window(s), s.cout); };
    const auto make_own = [&](Carver &carver) { return ForwardMemory<T>(carver, kernels, s, chunk); };
    const TeamMemory of(threads, make_shared, make_own);
    parallel(threads, [&](Team &team) {
        Product<float> weights = of.shared();
        weights.pack(team, {static_cast<const float *>(f.weight), window(s), 1});
        ForwardMemory<T> memory = of.own(team.rank());
        memory.sums.clear();
        each_chunk(team, kernels, s, chunk, [&](std::ptrdiff_t at, std::ptrdiff_t count) {
            T *const z = f.z + at * s.cout;
            float *const made = in_float(z, memory.z);
            unfold(s, x, at, count, memory.rows);
            weights.sums(memory.rows, count, made);
            keep(kernels, f, memory.sums, made, count, z);
        });
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of.own(t).sums.total(); }, 2 * s.cout, f.sums);
    });
}

template <class T> void train_stem_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads) {
    const TrainShape &s = b.shape;
    if (!b.dw)
        return;
    const float *const x = static_cast<const float *>(b.x);
    const int chunk = stem_chunk(kernels, s);
    const auto make_shared = [](Carver &) { return nullptr; };
    const auto make_own = [&](Carver &carver) { return BackwardMemory(carver, kernels, s, chunk); };
    const TeamMemory of(threads, make_shared, make_own);
    parallel(threads, [&](Team &team) {
        BackwardMemory memory = of.own(team.rank());
        bool first = true;
        each_chunk(team, kernels, s, chunk, [&](std::ptrdiff_t at, std::ptrdiff_t count) {
            const std::ptrdiff_t from = at * s.cout;
            run(kernels, GradientOf<T, T, float>{b.g + from, s.cout, b.z + from, s.cout, b.out, b.of_g, b.of_z,
                                                 b.constant, memory.dz, s.cout, count, s.cout});
            unfold(s, x, at, count, memory.rows);
            memory.gradient.add(memory.dz, memory.rows, Norm(), count, first);
            first = false;
        });
        if (first)
            memory.gradient.clear();
        const auto gradient = [&](int t) { return of.own(t).gradient; };
        add_weights(team, gradient, window(s), s.cout, b.dw);
    });
}

template void train_stem_forward(const KernelTable &, const TrainForward<float> &, int);
template void train_stem_forward(const KernelTable &, const TrainForward<bf16> &, int);
template void train_stem_backward(const KernelTable &, const TrainBackward<float> &, int);
template void train_stem_backward(const KernelTable &, const TrainBackward<bf16> &, int);

} // namespace mnv2
