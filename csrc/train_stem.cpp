// The stem of a training step, a piece of an output row at a time, in float whatever its output is rounded to. Its taps
// are read where they lie in padded lines: windows unfolded for a 1x1 convolution took 14 + 24 ms of one core where
// this takes 7 + 14, of 32 images.
#include "train_weight.h"

namespace mnv2 {
namespace {

constexpr int kLines = kStemTaps / 3; // colour after colour, the rows above, at and below of each

// What a piece of an output row reads of the image, with zeros for what is outside: colour after colour, or interleaved
// where the image is.
class Lines {
  public:
    // Of at most so many pixels.
    Lines(Carver &carver, const TrainShape &s, int pixels)
        : colours_(s.strides[1] == 1 && s.strides[3] == 3 ? 3 : 1), size_(2 * pixels + 1),
          lines_(carver.take<float>(static_cast<std::size_t>(kLines) * size_)) {}

    // Pixels [from, from + count) of an output row, counted over the batch.
    void read(const TrainShape &s, const float *x, std::ptrdiff_t row, int from, int count) {
        const int top = static_cast<int>(row % s.out_h()) * 2 - 1, left = from * 2 - 1, size = 2 * count + 1;
        const int begin = std::max(left, 0), end = std::min(left + size, s.w);
        const float *const image = x + row / s.out_h() * s.strides[0] + begin * s.strides[3];
        for (int i = 0; i < kLines / colours_; ++i) {
            float *const line = lines_ + static_cast<std::ptrdiff_t>(i) * colours_ * size_;
            float *const first = line + colours_ * (begin - left), *const last = line + colours_ * (end - left);
            const int h = top + i % 3;
            if (h < 0 || h >= s.h) {
                std::fill_n(line, colours_ * size, 0.0f);
                continue;
            }
            const float *const in = image + i / 3 * s.strides[1] + h * s.strides[2];
            std::fill(line, first, 0.0f);
            copy(in, colours_ == 1 ? s.strides[3] : 1, last - first, first);
            std::fill(last, line + colours_ * size, 0.0f);
        }
    }

    // Of a colour, above, at or below the pixel: its left tap of pixel 0.
    const float *line(int i) const {
        return colours_ == 1 ? lines_ + static_cast<std::ptrdiff_t>(i) * size_
                             : lines_ + static_cast<std::ptrdiff_t>(i % 3) * 3 * size_ + i / 3;
    }
    // From a tap to the next one.
    int step() const { return colours_; }

  private:
    static void copy(const float *in, std::ptrdiff_t step, std::ptrdiff_t count, float *out) {
        if (step == 1)
            std::copy_n(in, count, out);
        else
            for (std::ptrdiff_t i = 0; i < count; ++i)
                out[i] = in[i * step];
    }

    int colours_; // of a line
    std::ptrdiff_t size_;
    float *lines_;
};

// Pixels of a piece.
int piece(const TrainShape &s) { return std::min(s.out_w(), 224); }

// f(row, from, count) for the pieces of a member's share of the output rows.
template <class F> void each_piece(const Team &team, const TrainShape &s, const F &f) {
    long begin, end;
    team.share(static_cast<long>(s.n) * s.out_h(), 1, begin, end);
    for (long row = begin; row < end; ++row)
        for (int from = 0; from < s.out_w(); from += piece(s))
            f(row, from, std::min(piece(s), s.out_w() - from));
}

template <class T> struct ForwardMemory {
    ForwardMemory(Carver &carver, const KernelTable &kernels, const TrainShape &s)
        : lines(carver, s, piece(s)),
          z(carver.take<float>(std::is_same_v<T, float> ? 0 : static_cast<std::size_t>(piece(s)) * s.cout)),
          sums(carver, kernels, s.cout) {}
    Lines lines;
    float *z; // before it is rounded
    ChannelSums sums;
};

struct BackwardMemory {
    BackwardMemory(Carver &carver, const TrainShape &s)
        : lines(carver, s, piece(s)), dz(carver.take<float>(static_cast<std::size_t>(piece(s)) * s.cout)),
          dw(carver.take<float>(static_cast<std::size_t>(kStemTaps) * s.cout)) {}
    Lines lines;
    float *dz;
    float *dw; // [27][cout]
};

} // namespace

template <class T> void train_stem_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads) {
    const TrainShape &s = f.shape;
    const auto make_shared = [&](Carver &carver) { return Product<float>(carver, kernels, kStemTaps, s.cout); };
    const auto make_own = [&](Carver &carver) { return ForwardMemory<T>(carver, kernels, s); };
    const TeamMemory of(threads, make_shared, make_own);
    parallel(threads, [&](Team &team) {
        Product<float> weights = of.shared();
        weights.pack(team, {static_cast<const float *>(f.weight), kStemTaps, 1});
        ForwardMemory<T> memory = of.own(team.rank());
        memory.sums.clear();
        StemArgs args{{}, 2 * memory.lines.step(), weights.packed(), nullptr, nullptr, s.cout, 0, s.cout, false};
        for (int k = 0; k < kStemTaps; ++k)
            args.taps[k] = memory.lines.line(k / 3) + k % 3 * memory.lines.step();
        each_piece(team, s, [&](std::ptrdiff_t row, int from, int count) {
            T *const z = f.z + (row * s.out_w() + from) * s.cout;
            memory.lines.read(s, static_cast<const float *>(f.x), row, from, count);
            args.y = in_float(z, memory.z);
            args.pixels = count;
            kernels.stem(args);
            keep(kernels, f, memory.sums, args.y, count, z);
        });
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of.own(t).sums.total(); }, 2 * s.cout, f.sums);
    });
}

template <class T> void train_stem_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads) {
    const TrainShape &s = b.shape;
    if (!b.dw)
        return;
    const auto make_shared = [](Carver &) { return nullptr; };
    const auto make_own = [&](Carver &carver) { return BackwardMemory(carver, s); };
    const TeamMemory of(threads, make_shared, make_own);
    parallel(threads, [&](Team &team) {
        BackwardMemory memory = of.own(team.rank());
        std::fill_n(memory.dw, kStemTaps * static_cast<std::ptrdiff_t>(s.cout), 0.0f);
        StemWeightArgs args{{}, memory.lines.step(), memory.dz, memory.dw, 0, s.cout};
        for (int i = 0; i < kLines; ++i)
            args.lines[i] = memory.lines.line(i);
        each_piece(team, s, [&](std::ptrdiff_t row, int from, int count) {
            const std::ptrdiff_t at = (row * s.out_w() + from) * s.cout;
            run(kernels, GradientOf<T, T, float>{b.g + at, s.cout, b.z + at, s.cout, b.out, b.of_g, b.of_z, b.constant,
                                                 memory.dz, s.cout, count, s.cout});
            memory.lines.read(s, static_cast<const float *>(b.x), row, from, count);
            args.pixels = count;
            kernels.train_stem_weight(args);
        });
        team.sync();
        long begin, end;
        team.share(s.cout, 1, begin, end);
        for (long c = begin; c < end; ++c)
            for (int k = 0; k < kStemTaps; ++k) {
                float sum = 0;
                for (int t = 0; t < team.size(); ++t)
                    sum += of.own(t).dw[static_cast<std::ptrdiff_t>(k) * s.cout + c];
                b.dw[c * kStemTaps + k] = sum;
            }
    });
}

template void train_stem_forward(const KernelTable &, const TrainForward<float> &, int);
template void train_stem_forward(const KernelTable &, const TrainForward<bf16> &, int);
template void train_stem_backward(const KernelTable &, const TrainBackward<float> &, int);
template void train_stem_backward(const KernelTable &, const TrainBackward<bf16> &, int);

} // namespace mnv2
