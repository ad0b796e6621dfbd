// Runs the steps of an int8 network over images, in one thread or a team of them.
#pragma once

#include <atomic>

#include "int8_network.h"
#include "parallel.h"
#include "step_time.h"

namespace mnv2 {

// The pooled features of all images, as the classifier reads them: [image group][low bytes, high bytes][channels / 4]
// [4 images][4].
struct Int8Features {
    std::uint8_t *data = nullptr;
    int images;
    std::ptrdiff_t plane;

    Int8Features(int images, int channels)
        : images(images), plane(static_cast<std::ptrdiff_t>(kGroup) * ((channels + 3) / 4 * 4)) {}
    std::size_t size() const { return whole_lines(2 * groups(images) * plane); }
    void put(int image, int channel, int value) const {
        std::uint8_t *const at =
            data + image / kGroup * 2 * plane + channel / 4 * 16 + image % kGroup * 4 + channel % 4;
        at[0] = static_cast<std::uint8_t>(value & 255);
        at[plane] = static_cast<std::uint8_t>(value >> 8);
    }
};

class Int8Runner {
  public:
    Int8Runner(const KernelTable &kernels, const std::vector<Int8Layer> &layers, const std::vector<Int8Step> &steps,
               const Int8Plan &plan, const Int8Call &call, const Int8Input &input, const Int8Features &features,
               double *seconds = nullptr)
        : kernels_(kernels), layers_(layers), steps_(steps), plan_(plan), call_(call), input_(input),
          features_(features), seconds_(seconds) {}

    // Every image, by one member of a team that all call this with the same memory. Returns when this member is done.
    void run(Team &team, std::uint8_t *memory) const;

    // Whether every value of the images was a number, once run() is done.
    bool finite() const { return finite_.load(); }

  private:
    struct Arena {
        std::uint8_t *activation[2];
        float *residual;
        std::uint8_t *filtered;
        std::uint8_t *rows, *zeros;
        std::int64_t *sums;
        std::uint8_t *block;
        Int8Ahead *ahead;
    };
    // A pixels tensor.
    struct Tensor {
        std::uint8_t *data;
        int h, w;
        std::ptrdiff_t column;

        std::ptrdiff_t group() const { return w * column; }
        // Row groups [begin, end), columns [from, to).
        Int8Pixels part(int begin, int end, int from, int to) const {
            const int last = h - (end - 1) * kGroup;
            return {data + begin * group() + from * column, group(),  column, end - begin,
                    last < kGroup ? last : kGroup,          to - from};
        }
    };
    // The part of a step's output that a call of project makes.
    struct Part {
        int group_begin, group_end;
        int column_begin, column_end;
        int vector_begin, vector_end;
    };

    Arena arena(std::uint8_t *memory, const Team &team, Int8Ahead &ahead) const;
    Int8Ahead *fetch(const Arena &arena, const Int8Layer &layer) const;
    void image(Team &team, const Arena &arena, int image) const;
    void stem(Team &team, const Arena &arena, int step, int image, const Tensor &y) const;
    void block_by_rows(Team &team, const Arena &arena, int step, int image, const Tensor &x, const Tensor &y) const;
    void block_by_channels(Team &team, const Arena &arena, int step, const Tensor &x, const Tensor &y) const;
    void head(Team &team, const Arena &arena, int step, int image, const Tensor &x) const;
    void classify(Team &team) const;

    void expand(const Int8Layer &layer, const Arena &arena, const Tensor &x, int begin, int end, int vector_begin,
                int vector_end, std::uint8_t *hidden, int ring, int width) const;
    void project(const Int8Step &s, const Arena &arena, const Tensor &filtered, int first, const Tensor &y,
                 const Part &part) const;
    void stem_groups(const Int8Layer &layer, int image, const Arena &arena, int begin, int end, int height, int width,
                     Int8Target target, int ring, int &loaded) const;
    void load_row(int image, int row, std::uint8_t *out) const;

    std::ptrdiff_t vector_bytes() const { return static_cast<std::ptrdiff_t>(kernels_.lanes) * 4; }

    const KernelTable &kernels_;
    const std::vector<Int8Layer> &layers_;
    const std::vector<Int8Step> &steps_;
    const Int8Plan &plan_;
    const Int8Call &call_;
    const Int8Input &input_;
    const Int8Features &features_;
    double *const seconds_; // of each step for the last image and of the classifier, where the caller asks
    mutable std::atomic<bool> finite_{true};
};

} // namespace mnv2
