// Depthwise convolutions of a training step.
#include "train_rows.h"

namespace mnv2 {
namespace {

// Whether to stream the gradient of the input: it is no longer in a cache when it is read, and its rows are whole
// vectors. The layer takes half the time so at 112 x 112 x 32 and 56 x 56 x 144, and 3/4 at 112 x 112 x 96 with
// stride 2. Streaming what 1x1 layers write, or a forward pass, gained nothing.
bool streams(const KernelTable &kernels, const TrainBackward &b) {
    constexpr std::ptrdiff_t kLarge = 1 << 20; // floats
    const int c = b.shape.cin;
    return b.dx && b.in.relu6 && c % kernels.lanes == 0 && b.shape.in_pixels() * c >= kLarge &&
           reinterpret_cast<std::uintptr_t>(b.dx) % kCacheLine == 0;
}

struct ForwardMemory {
    ForwardMemory(Carver &carver, const KernelTable &kernels, const TrainForward &f)
        : input(carver, kernels, f.shape, f.x, f.in, f.expand), sums(carver, f.shape.cin) {}
    InputRows input;
    ChannelSums sums;
};

struct BackwardMemory {
    BackwardMemory(Carver &carver, const KernelTable &kernels, const TrainBackward &b)
        : input(carver, kernels, b.shape, b.x, b.in, b.expand), gradient(carver, kernels, b),
          dx(carver.take<float>(band_floats(b.shape))), image(carver.take<float>(block_floats(kernels, b.shape.cin))),
          dw(carver.take<double>(block_floats(kernels, b.shape.cin))), sums(carver, b.shape.cin) {}
    InputRows input;
    GradientRows gradient;
    float *dx;    // rows of the input's gradient before they are masked and streamed, or that nobody keeps
    float *image; // the weights' gradient of the image at hand
    double *dw;   // of those before
    ChannelSums sums;
};

// One member's rows of the backward pass.
class BackwardRows {
  public:
    BackwardRows(const KernelTable &kernels, const TrainBackward &b, const PackedDepthwise &shared,
                 BackwardMemory &memory)
        : kernels_(kernels), b_(b), s_(b.shape), shared_(shared), memory_(memory), taps_(block_floats(kernels, s_.cin)),
          stream_(streams(kernels, b)) {}

    void run(const Team &team) {
        memory_.sums.clear();
        std::fill_n(memory_.image, taps_, 0.0f);
        std::fill_n(memory_.dw, taps_, 0.0);
        each_band(
            team, s_, [this](long image) { new_image(image); },
            [this](long, int row, int rows) {
                const bool for_x = b_.dx || b_.sums;
                if (for_x && s_.stride == 1)
                    memory_.gradient.dz(row - 1); // a ring makes its rows from top to bottom
                if (b_.dw)
                    for (int o = row; o < row + rows; ++o)
                        weight_row(o);
                if (for_x)
                    input_rows(row, rows);
            });
        new_image(0);
    }

  private:
    void new_image(long image) {
        memory_.input.new_image(image, shared_.expand);
        memory_.gradient.new_image(image, shared_.taps.blocks());
        for (std::size_t i = 0; i < taps_; ++i) {
            memory_.dw[i] += memory_.image[i];
            memory_.image[i] = 0.0f;
        }
    }

    void weight_row(int o) {
        const int h = o * s_.stride;
        const float *const above = memory_.input.activated(h - 1), *const at = memory_.input.activated(h),
                           *const below = memory_.input.activated(h + 1);
        kernels_.train_depthwise_weight(
            {{above, at, below}, s_.cin, memory_.gradient.dz(o), s_.cin, memory_.image, s_.w, s_.stride, s_.cin});
    }

    void input_rows(int row, int rows) {
        const int first = memory_.gradient.first(row), count = memory_.gradient.count(row, rows);
        float *const to = b_.dx ? b_.dx + memory_.input.at(first) : nullptr;
        float *const dx = to && !stream_ ? to : memory_.dx;
        memory_.gradient.input(row, rows, dx);
        if (!b_.in.scale)
            return;
        // Masked and added to the sums, a row at a time: those of a ring are not next to each other.
        for (int i = 0; i < count; ++i) {
            const std::ptrdiff_t at = i * memory_.input.row();
            kernels_.train_sums({dx + at, s_.cin, memory_.input.raw(first + i), s_.cin, b_.in,
                                 to && b_.in.relu6 ? to + at : nullptr, s_.cin, stream_, memory_.sums.first,
                                 memory_.sums.second, s_.w, s_.cin});
            memory_.sums.add();
        }
    }

    const KernelTable &kernels_;
    const TrainBackward &b_;
    const TrainShape &s_;
    const PackedDepthwise &shared_;
    BackwardMemory &memory_;
    std::size_t taps_;
    bool stream_;
};

} // namespace

void train_depthwise_forward(const KernelTable &kernels, const TrainForward &f, int threads) {
    const TrainShape &s = f.shape;
    const int c = s.cin, wo = s.out_w();
    const auto shared = [&](Carver &carver) { return PackedDepthwise(carver, kernels, c, f.expand); };
    const auto own = [&](Carver &carver) { return ForwardMemory(carver, kernels, f); };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    Carver carver(scratch.data());
    PackedDepthwise common = shared(carver);
    common.taps.pack(kernels, f.weight, c, false);
    parallel(threads, [&](Team &team) {
        common.pack_expansion(team);
        ForwardMemory memory = of(team.rank());
        memory.sums.clear();
        const auto band = [&](long image, int row, int rows) {
            const float *windows[kRing];
            for (int i = 0; i < (rows - 1) * s.stride + 3; ++i)
                windows[i] = memory.input.activated(row * s.stride - 1 + i);
            const std::ptrdiff_t line = static_cast<std::ptrdiff_t>(wo) * c;
            float *const z = f.z + (image * s.out_h() + row) * line;
            kernels.depthwise({windows, c, common.taps.blocks(), z, c, line, rows, s.w, s.stride, c, false});
            if (f.sums) {
                const std::ptrdiff_t pixels = static_cast<std::ptrdiff_t>(rows) * wo;
                kernels.train_moments({z, c, memory.sums.first, memory.sums.second, pixels, c});
                memory.sums.add_moments(z, pixels);
            }
        };
        each_band(team, s, [&](long image) { memory.input.new_image(image, common.expand); }, band);
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of(t).sums.total(); }, 2 * c, f.sums);
    });
}

void train_depthwise_backward(const KernelTable &kernels, const TrainBackward &b, int threads) {
    const TrainShape &s = b.shape;
    const auto shared = [&](Carver &carver) { return PackedDepthwise(carver, kernels, s.cin, b.expand); };
    const auto own = [&](Carver &carver) { return BackwardMemory(carver, kernels, b); };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    Carver carver(scratch.data());
    PackedDepthwise common = shared(carver);
    common.taps.pack(kernels, b.weight, s.cin, s.stride == 1);
    parallel(threads, [&](Team &team) {
        common.pack_expansion(team);
        BackwardMemory memory = of(team.rank());
        BackwardRows(kernels, b, common, memory).run(team);
        if (b.sums)
            add_parts<double>(team, [&](int t) { return of(t).sums.total(); }, 2 * s.cin, b.sums);
        if (!b.dw)
            return;
        team.sync();
        long begin, end;
        team.share(s.cin, 1, begin, end);
        for (long c = begin; c < end; ++c)
            for (int tap = 0; tap < kTaps; ++tap) {
                const std::ptrdiff_t at = (c / kernels.lanes * kTaps + tap) * kernels.lanes + c % kernels.lanes;
                double sum = 0;
                for (int t = 0; t < team.size(); ++t)
                    sum += of(t).dw[at];
                b.dw[c * kTaps + tap] = static_cast<float>(sum);
            }
    });
}

} // namespace mnv2
