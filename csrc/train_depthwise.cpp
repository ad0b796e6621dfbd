// Depthwise convolutions of a training step: a thread goes down its rows of the batch's images, and what it reads of a
// row more than once it makes once, in a ring of rows that stays in L2.
#include "train_run.h"

namespace mnv2 {
namespace {

constexpr int kRing = 4;
constexpr int kTaps = 9;

// Output rows at a time. Their windows are at most kRing rows.
int band_rows(int stride) { return stride == 1 ? 2 : 1; }

// Rows of an image, made when they are first asked for. Rows are asked for from top to bottom.
class Ring {
  public:
    Ring(float *memory, std::ptrdiff_t row, int height) : memory_(memory), row_(row), height_(height) {}

    void restart() { made_ = -1; }

    // Null outside of the image. make(row, out) makes one.
    template <class Make> const float *at(int row, const Make &make) {
        if (row < 0 || row >= height_)
            return nullptr;
        if (made_ < 0)
            made_ = row - 1;
        for (; made_ < row; ++made_)
            make(made_ + 1, slot(made_ + 1));
        return slot(row);
    }

  private:
    float *slot(int row) const { return memory_ + row % kRing * row_; }

    float *memory_;
    std::ptrdiff_t row_;
    int height_;
    int made_ = -1; // the last one
};

// f(image, first row, rows) for a member's share of the output rows of all images, in bands of rows that do not cross
// images; new_image() before each image's first.
template <class NewImage, class Band>
void each_band(const Team &team, const TrainShape &s, const NewImage &new_image, const Band &f) {
    const int height = s.out_h();
    long begin, end;
    team.share(static_cast<long>(s.n) * height, 1, begin, end);
    for (long at = begin; at < end;) {
        const int row = static_cast<int>(at % height);
        if (row == 0 || at == begin)
            new_image();
        const long left = std::min<long>(end - at, height - row);
        const int rows = static_cast<int>(std::min<long>(left, band_rows(s.stride)));
        f(at / height, row, rows);
        at += rows;
    }
}

// Whether to stream the gradient of the input: it is no longer in a cache when it is read, and its rows are whole
// vectors. The layer takes half the time so at 112 x 112 x 32 and 56 x 56 x 144, and 3/4 at 112 x 112 x 96 with
// stride 2. Streaming what 1x1 layers write, or a forward pass, gained nothing.
bool streams(const KernelTable &kernels, const TrainBackward &b) {
    constexpr std::ptrdiff_t kLarge = 1 << 20; // floats
    const int c = b.shape.cin;
    return b.dx && b.in.relu6 && c % kernels.lanes == 0 && b.shape.in_pixels() * c >= kLarge &&
           reinterpret_cast<std::uintptr_t>(b.dx) % kCacheLine == 0;
}

std::size_t block_floats(const KernelTable &kernels, int channels) {
    return static_cast<std::size_t>(round_up(channels, kernels.lanes)) * kTaps;
}

// Packed weights with a bias of zero, the taps as they are or turned round.
struct PackedTaps {
    PackedTaps(Carver &carver, const KernelTable &kernels, int channels)
        : packed(carver.take<std::byte>(packed_depthwise_size(kernels, channels))), bias(carver.take<float>(channels)),
          turned(carver.take<float>(static_cast<std::size_t>(channels) * kTaps)) {}

    void pack(const KernelTable &kernels, const float *weight, int channels, bool turn) {
        std::fill_n(bias, channels, 0.0f);
        if (turn) {
            for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(channels) * kTaps; ++i)
                turned[i] = weight[i / kTaps * kTaps + kTaps - 1 - i % kTaps];
            weight = turned;
        }
        pack_depthwise(kernels, weight, bias, channels, packed);
    }
    const float *blocks() const { return reinterpret_cast<const float *>(packed); }

    std::byte *packed;
    float *bias, *turned;
};

struct ForwardMemory {
    ForwardMemory(Carver &carver, const TrainShape &s)
        : ring(carver.take<float>(static_cast<std::size_t>(kRing) * s.w * s.cin)), sums(carver, s.cin) {}
    float *ring;
    ChannelSums sums;
};

struct BackwardMemory {
    BackwardMemory(Carver &carver, const KernelTable &kernels, const TrainShape &s)
        : input(carver.take<float>(static_cast<std::size_t>(kRing) * s.w * s.cin)),
          dz(carver.take<float>(static_cast<std::size_t>(kRing) * s.out_w() * s.cin)),
          dx(carver.take<float>(static_cast<std::size_t>(2) * s.w * s.cin)),
          image(carver.take<float>(block_floats(kernels, s.cin))),
          dw(carver.take<double>(block_floats(kernels, s.cin))), sums(carver, s.cin) {}
    float *input, *dz;
    float *dx;    // rows of the input's gradient before they are masked and streamed
    float *image; // the weights' gradient of the image at hand
    double *dw;   // of those before
    ChannelSums sums;
};

// One member's rows of the backward pass.
class BackwardRows {
  public:
    BackwardRows(const KernelTable &kernels, const TrainBackward &b, const float *weight, BackwardMemory &memory)
        : kernels_(kernels), b_(b), s_(b.shape), weight_(weight), memory_(memory),
          input_(memory.input, static_cast<std::ptrdiff_t>(s_.w) * s_.cin, s_.h),
          dz_(memory.dz, static_cast<std::ptrdiff_t>(s_.out_w()) * s_.cin, s_.out_h()),
          taps_(block_floats(kernels, s_.cin)), stream_(streams(kernels, b)) {}

    void run(const Team &team) {
        memory_.sums.clear();
        std::fill_n(memory_.image, taps_, 0.0f);
        std::fill_n(memory_.dw, taps_, 0.0);
        each_band(
            team, s_, [this] { new_image(); },
            [this](long image, int row, int rows) {
                image_ = image;
                if (b_.dx && s_.stride == 1)
                    dz(row - 1); // a ring makes its rows from top to bottom
                if (b_.dw)
                    for (int o = row; o < row + rows; ++o)
                        weight_row(o);
                if (!b_.dx)
                    return;
                if (s_.stride == 1)
                    input_rows(row, rows);
                else
                    for (int h = 2 * row; h < std::min(2 * row + 2, s_.h); ++h)
                        input_row(row, h);
            });
        new_image();
    }

  private:
    void new_image() {
        input_.restart();
        dz_.restart();
        for (std::size_t i = 0; i < taps_; ++i) {
            memory_.dw[i] += memory_.image[i];
            memory_.image[i] = 0.0f;
        }
    }

    const float *dz(int row) {
        return dz_.at(row, [this](int made, float *out) {
            const int c = s_.cin;
            const std::ptrdiff_t at = (image_ * s_.out_h() + made) * s_.out_w() * c;
            kernels_.train_gradient(
                {b_.g + at, c, b_.z + at, c, b_.out, b_.of_g, b_.of_z, b_.constant, out, c, s_.out_w(), c});
        });
    }

    std::ptrdiff_t input_at(int row) const { return (image_ * s_.h + row) * s_.w * s_.cin; }

    const float *input(int row) {
        if (!b_.in.scale)
            return row < 0 || row >= s_.h ? nullptr : b_.x + input_at(row);
        return input_.at(row, [this](int made, float *out) {
            const int c = s_.cin;
            kernels_.train_activate({b_.x + input_at(made), c, b_.in, nullptr, 0, out, c, s_.w, c});
        });
    }

    void weight_row(int o) {
        const int h = o * s_.stride;
        const float *const above = input(h - 1), *const at = input(h), *const below = input(h + 1);
        kernels_.train_depthwise_weight(
            {{above, at, below}, s_.cin, dz(o), s_.cin, memory_.image, s_.w, s_.stride, s_.cin});
    }

    void input_rows(int row, int rows) {
        const float *windows[kRing];
        for (int i = 0; i < rows + 2; ++i)
            windows[i] = dz(row - 1 + i);
        float *const dx = stream_ ? memory_.dx : b_.dx + input_at(row);
        const std::ptrdiff_t ld = s_.cin;
        kernels_.depthwise({windows, ld, weight_, dx, ld, s_.w * ld, rows, s_.w, 1, s_.cin, false});
        finish(dx, row, rows);
    }

    void input_row(int o, int h) {
        const bool odd = h % 2 != 0;
        const float *const upper = dz(o), *const lower = odd ? dz(o + 1) : nullptr;
        float *const dx = stream_ ? memory_.dx : b_.dx + input_at(h);
        kernels_.train_depthwise_input({upper, lower, odd, s_.cin, weight_, dx, s_.cin, s_.w, s_.cin});
        finish(dx, h, 1);
    }

    // Masks input rows of the gradient and adds them to the sums.
    void finish(const float *dx, int row, int rows) {
        if (!b_.in.scale)
            return;
        const int c = s_.cin;
        const std::ptrdiff_t at = input_at(row);
        kernels_.train_sums({dx, c, b_.x + at, c, b_.in, b_.in.relu6 ? b_.dx + at : nullptr, c, stream_,
                             memory_.sums.first, memory_.sums.second, static_cast<std::ptrdiff_t>(rows) * s_.w, c});
        memory_.sums.add();
    }

    const KernelTable &kernels_;
    const TrainBackward &b_;
    const TrainShape &s_;
    const float *weight_;
    BackwardMemory &memory_;
    Ring input_, dz_;
    std::size_t taps_;
    bool stream_;
    long image_ = 0;
};

} // namespace

void train_depthwise_forward(const KernelTable &kernels, const TrainForward &f, int threads) {
    const TrainShape &s = f.shape;
    const int c = s.cin, wo = s.out_w();
    const auto shared = [&](Carver &carver) { return PackedTaps(carver, kernels, c); };
    const auto own = [&](Carver &carver) { return ForwardMemory(carver, s); };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    Carver carver(scratch.data());
    PackedTaps taps = shared(carver);
    taps.pack(kernels, f.weight, c, false);
    parallel(threads, [&](Team &team) {
        ForwardMemory memory = of(team.rank());
        memory.sums.clear();
        Ring ring(memory.ring, static_cast<std::ptrdiff_t>(s.w) * c, s.h);
        const auto band = [&](long image, int row, int rows) {
            const auto input_at = [&](int h) { return f.x + (image * s.h + h) * s.w * c; };
            const float *windows[kRing];
            for (int i = 0; i < (rows - 1) * s.stride + 3; ++i) {
                const int h = row * s.stride - 1 + i;
                if (f.in.scale)
                    windows[i] = ring.at(h, [&](int made, float *out) {
                        kernels.train_activate({input_at(made), c, f.in, nullptr, 0, out, c, s.w, c});
                    });
                else
                    windows[i] = h < 0 || h >= s.h ? nullptr : input_at(h);
            }
            const std::ptrdiff_t line = static_cast<std::ptrdiff_t>(wo) * c;
            float *const z = f.z + (image * s.out_h() + row) * line;
            kernels.depthwise({windows, c, taps.blocks(), z, c, line, rows, s.w, s.stride, c, false});
            if (f.sums) {
                const std::ptrdiff_t pixels = static_cast<std::ptrdiff_t>(rows) * wo;
                kernels.train_moments({z, c, memory.sums.first, memory.sums.second, pixels, c});
                memory.sums.add_moments(z, pixels);
            }
        };
        each_band(team, s, [&] { ring.restart(); }, band);
        if (f.sums)
            add_parts<double>(team, [&](int t) { return of(t).sums.total(); }, 2 * c, f.sums);
    });
}

void train_depthwise_backward(const KernelTable &kernels, const TrainBackward &b, int threads) {
    const TrainShape &s = b.shape;
    const auto shared = [&](Carver &carver) { return PackedTaps(carver, kernels, s.cin); };
    const auto own = [&](Carver &carver) { return BackwardMemory(carver, kernels, s); };
    const std::size_t before = bytes_of(shared), each = bytes_of(own);
    const Scratch scratch(before + threads * each);
    const auto of = [&](int rank) {
        Carver carver(scratch.data() + before + rank * each);
        return own(carver);
    };
    Carver carver(scratch.data());
    PackedTaps taps = shared(carver);
    taps.pack(kernels, b.weight, s.cin, s.stride == 1);
    parallel(threads, [&](Team &team) {
        BackwardMemory memory = of(team.rank());
        BackwardRows(kernels, b, taps.blocks(), memory).run(team);
        if (b.dx && b.sums)
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
