// 1x1 convolutions and the stem, which is one over unfolded windows: a chunk of pixels at a time goes through all that
// is to be done with it while it lies in L2.
#include "train_run.h"

namespace mnv2 {
namespace {

int inputs(const TrainShape &s) { return s.kind == TrainKind::stem ? 9 * s.cin : s.cin; }

// The windows of output pixels [from, from + count), [count][cin][3][3] as torch lays the weights out.
void unfold(const TrainShape &s, const float *x, std::ptrdiff_t from, std::ptrdiff_t count, float *rows) {
    const int ho = s.out_h(), wo = s.out_w(), depth = inputs(s);
    for (std::ptrdiff_t p = from; p < from + count; ++p, rows += depth) {
        const int ow = static_cast<int>(p % wo), oh = static_cast<int>(p / wo % ho);
        const float *const image = x + p / wo / ho * s.strides[0];
        float *out = rows;
        for (int c = 0; c < s.cin; ++c)
            for (int kh = 0; kh < 3; ++kh) {
                const int h = oh * s.stride - 1 + kh;
                const float *const line = image + c * s.strides[1] + h * s.strides[2];
                for (int kw = 0; kw < 3; ++kw) {
                    const int w = ow * s.stride - 1 + kw;
                    *out++ = h >= 0 && h < s.h && w >= 0 && w < s.w ? line[w * s.strides[3]] : 0.0f;
                }
            }
    }
}

int panels(const KernelTable &kernels, int channels) { return (channels + kernels.panel - 1) / kernels.panel; }

std::size_t packed_floats(const KernelTable &kernels, int channels, int depth) {
    return static_cast<std::size_t>(packed_columns(kernels, channels)) * depth;
}

// All panels of a matrix, by all members of the team, which may read them when this returns.
void pack(Team &team, const KernelTable &kernels, const Matrix &matrix, int channels, int depth, float *out) {
    long begin, end;
    team.share(panels(kernels, channels), 1, begin, end);
    const int from = static_cast<int>(begin) * kernels.panel;
    pack_panels(kernels, matrix, channels, 0, depth, from, std::min(static_cast<int>(end) * kernels.panel, channels),
                out + static_cast<std::ptrdiff_t>(from) * depth);
    team.sync();
}

struct ForwardMemory {
    ForwardMemory(Carver &carver, const TrainForward &f, int chunk)
        : input(carver.take<float>(static_cast<std::size_t>(chunk) * inputs(f.shape))), sums(carver, f.shape.cout) {}
    float *input;
    ChannelSums sums;
};

struct BackwardMemory {
    BackwardMemory(Carver &carver, const KernelTable &kernels, const TrainBackward &b, int chunk)
        : dz(carver.take<float>(static_cast<std::size_t>(chunk) * b.shape.cout)),
          rows(carver.take<float>(b.shape.kind == TrainKind::stem ? static_cast<std::size_t>(chunk) * inputs(b.shape)
                                                                  : 0)),
          input(carver.take<float>(b.dw ? packed_floats(kernels, inputs(b.shape), chunk) : 0)),
          dw(carver.take<float>(b.dw ? static_cast<std::size_t>(b.shape.cout) * inputs(b.shape) : 0)),
          sums(carver, b.shape.cin) {}
    float *dz;
    float *rows;  // unfolded
    float *input; // activated, in panels
    float *dw;
    ChannelSums sums;
};

// One chunk of the backward pass, of `count` output pixels from `at` on.
void backward_chunk(const KernelTable &kernels, const TrainBackward &b, const float *packed, BackwardMemory &memory,
                    int chunk, std::ptrdiff_t at, std::ptrdiff_t count, bool first) {
    const TrainShape &s = b.shape;
    const std::ptrdiff_t of_z = at * s.cout, of_x = at * s.cin;
    kernels.train_gradient(
        {b.g + of_z, s.cout, b.z + of_z, s.cout, b.out, b.of_g, b.of_z, b.constant, memory.dz, s.cout, count, s.cout});
    if (b.dw) {
        const int depth = inputs(s);
        const float *x = b.x + of_x;
        if (s.kind == TrainKind::stem) {
            unfold(s, b.x, at, count, memory.rows);
            x = memory.rows;
        }
        kernels.train_panels({x, depth, b.in, memory.input, chunk, count, depth});
        kernels.train_weight_gradient(
            {memory.dz, s.cout, memory.input, chunk, memory.dw, depth, count, depth, s.cout, !first});
    }
    if (b.dx) {
        float *const dx = b.dx + of_x;
        kernels.pointwise({memory.dz, s.cout, packed, nullptr, b.residual ? b.residual + of_x : nullptr, s.cin, dx,
                           s.cin, count, s.cout, s.cin, 0, panels(kernels, s.cin), false});
        if (b.in.scale) {
            kernels.train_sums({dx, s.cin, b.x + of_x, s.cin, b.in, b.in.relu6 ? dx : nullptr, s.cin, false,
                                memory.sums.first, memory.sums.second, count, s.cin});
            memory.sums.add();
        }
    }
}

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
        pack(team, kernels, {f.weight, depth, 1}, s.cout, depth, packed);
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
            float *const z = f.z + at * s.cout;
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
    const auto own = [&](Carver &carver) { return BackwardMemory(carver, kernels, b, chunk); };
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
            pack(team, kernels, {b.weight, 1, s.cin}, s.cin, s.cout, packed);
        BackwardMemory memory = of(team.rank());
        memory.sums.clear();
        long begin, end;
        team.share(static_cast<long>(s.out_pixels()), kernels.tile_rows, begin, end);
        if (b.dw && begin == end)
            std::fill_n(memory.dw, static_cast<std::ptrdiff_t>(s.cout) * depth, 0.0f);
        for (std::ptrdiff_t at = begin; at < end; at += chunk)
            backward_chunk(kernels, b, packed, memory, chunk, at, std::min<std::ptrdiff_t>(chunk, end - at),
                           at == begin);
        if (b.dw)
            add_parts<float>(team, [&](int t) { return of(t).dw; }, static_cast<std::ptrdiff_t>(s.cout) * depth, b.dw);
        if (b.dx && b.sums)
            add_parts<double>(team, [&](int t) { return of(t).sums.total(); }, 2 * s.cin, b.sums);
    });
}

} // namespace mnv2
