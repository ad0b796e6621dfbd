// Rows of a depthwise layer in a training step: a thread goes down its rows of the batch's images, and what it reads of
// a row more than once it makes once, in a ring of rows that stays in L2.
#pragma once

#include "train_run.h"

namespace mnv2 {

constexpr int kRing = 4;
constexpr int kTaps = 9;

// Output rows at a time. Their windows are at most kRing rows.
inline int band_rows(int stride) { return stride == 1 ? 2 : 1; }

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
// images; new_image(image) before each image's first.
template <class NewImage, class Band>
void each_band(const Team &team, const TrainShape &s, const NewImage &new_image, const Band &f) {
    const int height = s.out_h();
    long begin, end;
    team.share(static_cast<long>(s.n) * height, 1, begin, end);
    for (long at = begin; at < end;) {
        const int row = static_cast<int>(at % height);
        if (row == 0 || at == begin)
            new_image(at / height);
        const long left = std::min<long>(end - at, height - row);
        const int rows = static_cast<int>(std::min<long>(left, band_rows(s.stride)));
        f(at / height, row, rows);
        at += rows;
    }
}

inline std::size_t block_floats(const KernelTable &kernels, int channels) {
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

// The expansion before a depthwise layer, in rows of raw float outputs.
template <class T> class ExpandedRows {
  public:
    ExpandedRows(Carver &carver, const TrainShape &s, const TrainExpand<T> *expand)
        : s_(s), expand_(expand), ring_(carver.take<float>(expand ? static_cast<std::size_t>(kRing) * s.w * s.cin : 0),
                                        static_cast<std::ptrdiff_t>(s.w) * s.cin, s.h) {}

    void new_image(long image, const Product<T> *weights) {
        image_ = image;
        weights_ = weights;
        ring_.restart();
    }

    const float *at(int h) {
        return ring_.at(h, [this](int made, float *out) { weights_->sums(input(made), s_.w, out); });
    }

    // A row as weights and bias with the norm in them give it, activated.
    void activated(int h, const float *bias, bool relu6, float *out) const {
        weights_->activated(input(h), s_.w, bias, relu6, out);
    }

  private:
    const T *input(int h) const { return expand_->x + (image_ * s_.h + h) * s_.w * expand_->cin; }

    const TrainShape &s_;
    const TrainExpand<T> *expand_;
    Ring ring_;
    const Product<T> *weights_ = nullptr;
    long image_ = 0;
};

// The input's rows, activated; raw ones come from memory, or from the expansion.
template <class T> class InputRows {
  public:
    InputRows(Carver &carver, const KernelTable &kernels, const TrainShape &s, const void *x, const Norm &norm,
              const TrainExpand<T> *expand)
        : expanded(carver, s, expand), kernels_(kernels), s_(s), x_(static_cast<const T *>(x)), norm_(norm),
          expands_(expand != nullptr), as_it_is_(!norm.scale && std::is_same_v<T, float>),
          ring_(as_it_is_ ? nullptr : carver.take<float>(kRing * row()), row(), s.h) {}

    // Rows are asked for from top to bottom. `weights`: the expansion's; `bias`: with which they give activated rows.
    void new_image(long image, const Product<T> *weights, const float *bias = nullptr) {
        image_ = image;
        bias_ = bias;
        expanded.new_image(image, weights);
        ring_.restart();
    }

    // Null outside of the image.
    const float *activated(int h) {
        if constexpr (std::is_same_v<T, float>)
            if (as_it_is_)
                return h < 0 || h >= s_.h ? nullptr : raw(h);
        return ring_.at(h, [this](int made, float *out) {
            if (bias_)
                expanded.activated(made, bias_, norm_.relu6, out);
            else if (expands_)
                run(kernels_, activate(expanded.at(made), out));
            else
                run(kernels_, activate(raw(made), out));
        });
    }

    const T *raw(int h) const { return x_ + at(h); } // where there is no expansion

    std::ptrdiff_t row() const { return static_cast<std::ptrdiff_t>(s_.w) * s_.cin; }
    std::ptrdiff_t at(int h) const { return (image_ * s_.h + h) * row(); }

    ExpandedRows<T> expanded;

  private:
    template <class X> Activate<X, float> activate(const X *x, float *out) const {
        return {x, s_.cin, norm_, nullptr, 0, out, s_.cin, s_.w, s_.cin};
    }

    const KernelTable &kernels_;
    const TrainShape &s_;
    const T *x_;
    Norm norm_;
    bool expands_, as_it_is_;
    Ring ring_;
    const float *bias_ = nullptr;
    long image_ = 0;
};

// Rows of the output's gradient, dz, and of the input's made of them.
template <class T> class GradientRows {
  public:
    GradientRows(Carver &carver, const KernelTable &kernels, const TrainBackward<T> &b)
        : kernels_(kernels), b_(b), s_(b.shape), dz_(carver.take<float>(kRing * row()), row(), s_.out_h()) {}

    // `blocks`: the weights, turned round where the stride is 1.
    void new_image(long image, const float *blocks) {
        image_ = image;
        blocks_ = blocks;
        dz_.restart();
    }

    const float *dz(int o) {
        return dz_.at(o, [this](int made, float *out) {
            const int c = s_.cin;
            const std::ptrdiff_t at = (image_ * s_.out_h() + made) * row();
            run(kernels_, GradientOf<T, T, float>{b_.g + at, c, b_.z + at, c, b_.out, b_.of_g, b_.of_z, b_.constant,
                                                  out, c, s_.out_w(), c});
        });
    }

    // The input's rows for a band of output rows are [first, first + count).
    int first(int row) const { return row * s_.stride; }
    int count(int row, int rows) const { return std::min(rows * s_.stride, s_.h - first(row)); }

    // Their gradient, without gaps.
    void input(int row, int rows, float *dx) {
        const std::ptrdiff_t c = s_.cin;
        if (s_.stride == 1) {
            const float *windows[kRing];
            for (int i = 0; i < rows + 2; ++i)
                windows[i] = dz(row - 1 + i);
            kernels_.depthwise({windows, c, blocks_, dx, c, s_.w * c, rows, s_.w, 1, s_.cin, false});
            return;
        }
        const float *const upper = dz(row);
        kernels_.train_depthwise_input({upper, nullptr, false, c, blocks_, dx, c, s_.w, s_.cin});
        if (count(row, rows) == 2)
            kernels_.train_depthwise_input({upper, dz(row + 1), true, c, blocks_, dx + s_.w * c, c, s_.w, s_.cin});
    }

  private:
    std::ptrdiff_t row() const { return static_cast<std::ptrdiff_t>(s_.out_w()) * s_.cin; }

    const KernelTable &kernels_;
    const TrainBackward<T> &b_;
    const TrainShape &s_;
    Ring dz_;
    const float *blocks_ = nullptr;
    long image_ = 0;
};

// Floats of the input's rows that a band makes.
inline std::size_t band_floats(const TrainShape &s) { return static_cast<std::size_t>(2) * s.w * s.cin; }

// What the members of a team share of a depthwise layer: its packed taps, and the expansion's weights where it has one.
template <class T> class PackedDepthwise {
  public:
    PackedDepthwise(Carver &carver, const KernelTable &kernels, int channels, const TrainExpand<T> *expand)
        : taps(carver, kernels, channels), expansion(carver, kernels, expand ? expand->cin : 0, expand ? channels : 0),
          from_(expand) {}

    // By all members of the team.
    void pack_expansion(Team &team) {
        if (from_)
            expansion.pack(team, {from_->weight, from_->cin, 1});
    }

    PackedTaps taps; // packed by one, before the others read them
    Product<T> expansion;

  private:
    const TrainExpand<T> *from_;
};

} // namespace mnv2
