// What the files of a training step share: memory, chunks of pixels, and sums that are added in order.
#pragma once

#include <algorithm>

#include "pack.h"
#include "parallel.h"
#include "train.h"
#include "workspace.h"

namespace mnv2 {

// Memory for one call from that of earlier ones: a thread's buffers would else be fresh pages each time.
class Scratch {
  public:
    explicit Scratch(std::size_t bytes) : workspace_(pool().take(bytes)) {}
    ~Scratch() { pool().give(std::move(workspace_)); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    std::byte *data() const { return workspace_.memory.get(); }

  private:
    static Workspaces &pool();
    Workspace workspace_;
};

// Hands out parts of a piece of memory; without any it counts what would be needed.
class Carver {
  public:
    explicit Carver(std::byte *memory = nullptr) : memory_(memory) {}
    template <class T> T *take(std::size_t count) {
        std::byte *const at = memory_ ? memory_ + used_ : nullptr;
        used_ += whole_lines(count * sizeof(T));
        return reinterpret_cast<T *>(at);
    }
    std::size_t used() const { return used_; }

  private:
    std::byte *memory_;
    std::size_t used_ = 0;
};

// Bytes of what make(carver) takes.
template <class Make> std::size_t bytes_of(const Make &make) {
    Carver counts;
    make(counts);
    return counts.used();
}

// Pixels that are worked on at a time, `floats` a pixel in all buffers, so that they stay in L1 and L2.
int chunk_pixels(std::ptrdiff_t floats);

// One thread's sums over pixels, of two numbers a channel: float32 within a chunk, float64 over chunks.
class ChannelSums {
  public:
    ChannelSums(Carver &carver, int channels)
        : first(carver.take<float>(channels)), second(carver.take<float>(channels)),
          total_(carver.take<double>(2 * static_cast<std::size_t>(channels))), channels_(channels) {}

    float *const first; // of a chunk
    float *const second;

    void clear() { std::fill_n(total_, 2 * channels_, 0.0); }
    void add();                                                   // what a kernel has left in first and second
    void add_moments(const float *origin, std::ptrdiff_t pixels); // of values less `origin`: added as sum and square
    const double *total() const { return total_; }

  private:
    double *total_;
    int channels_;
};

// out[i] = parts[0][i] + parts[1][i] + ..., by all members of the team, after they have all arrived.
template <class T, class Y, class Part> void add_parts(Team &team, const Part &part, std::ptrdiff_t count, Y *out) {
    constexpr long kBlock = 64;
    team.sync();
    long begin, end;
    team.share(static_cast<long>(count), kBlock, begin, end);
    for (long at = begin; at < end; at += kBlock) {
        const long n = std::min(kBlock, end - at);
        T sum[kBlock];
        std::copy_n(part(0) + at, n, sum);
        for (int t = 1; t < team.size(); ++t) {
            const T *const more = part(t) + at;
            for (long i = 0; i < n; ++i)
                sum[i] += more[i];
        }
        for (long i = 0; i < n; ++i)
            out[at + i] = static_cast<Y>(sum[i]);
    }
}

// Panels of so many channels, and the floats of a packed matrix.
inline int panels(const KernelTable &kernels, int channels) { return (channels + kernels.panel - 1) / kernels.panel; }

inline std::size_t packed_floats(const KernelTable &kernels, int channels, int depth) {
    return static_cast<std::size_t>(packed_columns(kernels, channels)) * depth;
}

// Packs all panels of a matrix, by all members of the team, which may read them when this returns.
inline void pack_shared(Team &team, const KernelTable &kernels, const Matrix &matrix, int channels, int depth,
                        float *out) {
    long begin, end;
    team.share(panels(kernels, channels), 1, begin, end);
    const int from = static_cast<int>(begin) * kernels.panel;
    pack_panels(kernels, matrix, channels, 0, depth, from, std::min(static_cast<int>(end) * kernels.panel, channels),
                out + static_cast<std::ptrdiff_t>(from) * depth);
    team.sync();
}

void train_gemm_forward(const KernelTable &kernels, const TrainForward &f, int threads);
void train_gemm_backward(const KernelTable &kernels, const TrainBackward &b, int threads);
void train_depthwise_forward(const KernelTable &kernels, const TrainForward &f, int threads);
void train_depthwise_backward(const KernelTable &kernels, const TrainBackward &b, int threads);

} // namespace mnv2
