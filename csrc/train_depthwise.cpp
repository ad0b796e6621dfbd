// Depthwise convolutions of a training step.
#include "train_expand.h"
#include "train_rows.h"

namespace mnv2 {
namespace {

// Whether to stream the gradient of the input: it is no longer in a cache when it is read, and its rows are whole
// vectors. The layer takes half the time so at 112 x 112 x 32 and 56 x 56 x 144, and 3/4 at 112 x 112 x 96 with
// stride 2. Streaming what 1x1 layers write, or a forward pass, gained nothing.
bool streams(const KernelTable &kernels, const TrainBackward<float> &b) {
    constexpr std::ptrdiff_t kLarge = 1 << 20; // floats
    const int c = b.shape.cin;
    return b.dx && b.in.relu6 && c % kernels.lanes == 0 && b.shape.in_pixels() * c >= kLarge &&
           reinterpret_cast<std::uintptr_t>(b.dx) % kCacheLine == 0;
}
bool streams(const KernelTable &, const TrainBackward<bf16> &) { return false; } // half vectors

template <class T> struct ForwardMemory {
    ForwardMemory(Carver &carver, const KernelTable &kernels, const TrainForward<T> &f)
        : input(carver, kernels, f.shape, f.x, f.in, f.expand),
          z(carver.take<float>(std::is_same_v<T, float> ? 0
                                                        : 2 * static_cast<std::size_t>(f.shape.out_w()) * f.shape.cin)),
          sums(carver, kernels, f.shape.cin) {}
    InputRows<T> input;
    float *z; // a band, before it is rounded
    ChannelSums sums;
};

// What the members of a team share of a forward pass. Of float an expansion's weights have its norm in them, so that
// their product with a row is activated already (1% of a step); of bf16 they would be rounded once more.
template <class T> class ForwardWeights {
  public:
    ForwardWeights(Carver &carver, const KernelTable &kernels, const TrainForward<T> &f)
        : packed(carver, kernels, f.shape.cin, f.expand), kernels_(kernels), f_(f),
          folds_(std::is_same_v<T, float> && f.expand && f.in.scale),
          scaled_(carver.take<T>(folds_ ? static_cast<std::size_t>(f.shape.cin) * f.expand->cin : 0)),
          bias_(carver.take<float>(folds_ ? round_up(f.shape.cin, kernels.panel) : 0)) {}

    // By one member, before all of them pack.
    void start() {
        packed.taps.pack(kernels_, static_cast<const float *>(f_.weight), f_.shape.cin, false);
        if (!folds_)
            return;
        scale_weight(*f_.expand, f_.in.scale, f_.shape.cin, scaled_);
        pack_bias(kernels_, f_.in.shift, f_.shape.cin, bias_);
    }
    void pack(Team &team) {
        if (folds_)
            packed.expansion.pack(team, {scaled_, f_.expand->cin, 1});
        else
            packed.pack_expansion(team);
    }
    const float *bias() const { return folds_ ? bias_ : nullptr; }

    PackedDepthwise<T> packed;

  private:
    const KernelTable &kernels_;
    const TrainForward<T> &f_;
    bool folds_;
    T *scaled_;
    float *bias_;
};

template <class T> struct BackwardMemory {
    BackwardMemory(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b)
        : input(carver, kernels, b.shape, b.x, b.in, b.expand), gradient(carver, kernels, b),
          dx(carver.take<float>(band_floats(b.shape))), image(carver.take<float>(block_floats(kernels, b.shape.cin))),
          dw(carver.take<double>(block_floats(kernels, b.shape.cin))), sums(carver, kernels, b.shape.cin),
          expansion(carver, kernels, b, 2 * b.shape.w) {}
    InputRows<T> input;
    GradientRows<T> gradient;
    float *dx;    // rows of the input's gradient before they are masked, rounded and streamed, or that nobody keeps
    float *image; // the weights' gradient of the image at hand
    double *dw;   // of those before
    ChannelSums sums;
    ExpandGradient<T> expansion;
};

template <class T> struct SharedMemory {
    SharedMemory(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b)
        : depthwise(carver, kernels, b.shape.cin, b.expand), expansion(carver, kernels, b) {}
    PackedDepthwise<T> depthwise;
    ExpandWeights<T> expansion;
};

// One member's rows of the backward pass.
template <class T> class BackwardRows {
  public:
    BackwardRows(const KernelTable &kernels, const TrainBackward<T> &b, const SharedMemory<T> &shared,
                 BackwardMemory<T> &memory)
        : kernels_(kernels), b_(b), s_(b.shape), shared_(shared), memory_(memory), taps_(block_floats(kernels, s_.cin)),
          stream_(streams(kernels, b)) {}

    void run(const Team &team) {
        memory_.sums.clear();
        memory_.expansion.clear();
        std::fill_n(memory_.image, taps_, 0.0f);
        std::fill_n(memory_.dw, taps_, 0.0);
        each_band(
            team, s_, [this](long image) { new_image(image); },
            [this](long image, int row, int rows) {
                const bool for_x = b_.dx || b_.sums;
                if (for_x && s_.stride == 1)
                    memory_.gradient.dz(row - 1); // a ring makes its rows from top to bottom
                if (b_.dw)
                    for (int o = row; o < row + rows; ++o)
                        weight_row(o);
                if (for_x)
                    input_rows(image, row, rows);
            });
        end_image();
        memory_.expansion.close();
    }

  private:
    void new_image(long image) {
        memory_.input.new_image(image, &shared_.depthwise.expansion);
        memory_.gradient.new_image(image, shared_.depthwise.taps.blocks());
        end_image();
    }

    void end_image() {
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

    void input_rows(long image, int row, int rows) {
        const int first = memory_.gradient.first(row), count = memory_.gradient.count(row, rows);
        T *const to = b_.dx ? b_.dx + memory_.input.at(first) : nullptr;
        float *const dx = to && !stream_ ? in_float(to, memory_.dx) : memory_.dx;
        memory_.gradient.input(row, rows, dx);
        if (!b_.in.scale) {
            round(dx, static_cast<std::ptrdiff_t>(count) * s_.w, to);
            return;
        }
        // Masked and added to the sums, a row at a time: those of a ring are not next to each other.
        for (int i = 0; i < count; ++i) {
            const std::ptrdiff_t at = i * memory_.input.row();
            const bool writes = to && (b_.in.relu6 || std::is_same_v<T, bf16>);
            if (b_.expand)
                sums<float>(dx + at, memory_.input.expanded.at(first + i), b_.in.relu6 ? dx + at : nullptr);
            else
                sums<T>(dx + at, memory_.input.raw(first + i), writes ? to + at : nullptr);
        }
        if (b_.expand)
            memory_.expansion.add(dx, (image * s_.h + first) * s_.w, static_cast<std::ptrdiff_t>(count) * s_.w,
                                  shared_.expansion);
    }

    template <class Z> void sums(const float *dx, const Z *x, Z *masked) {
        mnv2::run(kernels_, Sums<float, Z>{dx, s_.cin, x, s_.cin, b_.in, masked, s_.cin, stream_, memory_.sums.first,
                                           memory_.sums.second, s_.w, s_.cin});
        memory_.sums.add();
    }

    void round(const float *, std::ptrdiff_t, float *) {}
    void round(const float *dx, std::ptrdiff_t pixels, bf16 *to) {
        kernels_.narrow({dx, s_.cin, to, s_.cin, pixels, s_.cin});
    }

    const KernelTable &kernels_;
    const TrainBackward<T> &b_;
    const TrainShape &s_;
    const SharedMemory<T> &shared_;
    BackwardMemory<T> &memory_;
    std::size_t taps_;
    bool stream_;
};

} // namespace

template <class T> void train_depthwise_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads) {
    const TrainShape &s = f.shape;
    const int c = s.cin, wo = s.out_w();
    const auto make_shared = [&](Carver &carver) { return ForwardWeights<T>(carver, kernels, f); };
    const auto make_own = [&](Carver &carver) { return ForwardMemory<T>(carver, kernels, f); };
    const TeamMemory of(threads, make_shared, make_own);
    ForwardWeights<T> shared = of.shared();
    shared.start();
    parallel(threads, [&](Team &team) {
        shared.pack(team);
        ForwardMemory<T> memory = of.own(team.rank());
        memory.sums.clear();
        const auto band = [&](long image, int row, int rows) {
            const float *windows[kRing];
            for (int i = 0; i < (rows - 1) * s.stride + 3; ++i)
                windows[i] = memory.input.activated(row * s.stride - 1 + i);
            const std::ptrdiff_t line = static_cast<std::ptrdiff_t>(wo) * c,
                                 pixels = static_cast<std::ptrdiff_t>(rows) * wo;
            T *const z = f.z + (image * s.out_h() + row) * line;
            float *const made = in_float(z, memory.z);
            kernels.depthwise({windows, c, shared.packed.taps.blocks(), made, c, line, rows, s.w, s.stride, c, false});
            keep(kernels, f, memory.sums, made, pixels, z);
        };
        const auto new_image = [&](long image) {
            memory.input.new_image(image, &shared.packed.expansion, shared.bias());
        };
        each_band(team, s, new_image, band);
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of.own(t).sums.total(); }, 2 * c, f.sums);
    });
}

template <class T> void train_depthwise_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads) {
    const TrainShape &s = b.shape;
    const auto make_shared = [&](Carver &carver) { return SharedMemory<T>(carver, kernels, b); };
    const auto make_own = [&](Carver &carver) { return BackwardMemory<T>(carver, kernels, b); };
    const TeamMemory of(threads, make_shared, make_own);
    SharedMemory<T> shared = of.shared();
    shared.depthwise.taps.pack(kernels, static_cast<const float *>(b.weight), s.cin, s.stride == 1);
    shared.expansion.scale();
    parallel(threads, [&](Team &team) {
        shared.depthwise.pack_expansion(team);
        shared.expansion.pack(team);
        BackwardMemory<T> memory = of.own(team.rank());
        BackwardRows<T>(kernels, b, shared, memory).run(team);
        if (b.expanded && b.expanded->dw)
            add_weights(
                team, [&](int t) { return of.own(t).expansion.gradient(); }, b.expand->cin, s.cin, b.expanded->dw);
        if (b.sums)
            add_parts<double>(team, [&](int t) { return of.own(t).sums.total(); }, 2 * s.cin, b.sums);
        if (!b.dw)
            return;
        const auto part = [&](int t) { return of.own(t).dw; };
        double *const total = part(0);
        add_parts<double>(team, part, static_cast<std::ptrdiff_t>(block_floats(kernels, s.cin)), total);
        team.sync();
        long begin, end;
        team.share(s.cin, 1, begin, end);
        for (long c = begin; c < end; ++c)
            for (int tap = 0; tap < kTaps; ++tap)
                b.dw[c * kTaps + tap] =
                    static_cast<float>(total[(c / kernels.lanes * kTaps + tap) * kernels.lanes + c % kernels.lanes]);
    });
}

template void train_depthwise_forward(const KernelTable &, const TrainForward<float> &, int);
template void train_depthwise_forward(const KernelTable &, const TrainForward<bf16> &, int);
template void train_depthwise_backward(const KernelTable &, const TrainBackward<float> &, int);
template void train_depthwise_backward(const KernelTable &, const TrainBackward<bf16> &, int);

} // namespace mnv2
