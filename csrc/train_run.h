// What the files of a training step share: memory, chunks of pixels, and sums that are added in order.
#pragma once

#include <algorithm>
#include <type_traits>

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

// Memory of one call: what a team shares, and each member's own. make_shared(carver), make_own(carver) carve them.
template <class MakeShared, class MakeOwn> class TeamMemory {
  public:
    TeamMemory(int threads, const MakeShared &make_shared, const MakeOwn &make_own)
        : make_shared_(make_shared), make_own_(make_own), before_(bytes_of(make_shared)), each_(bytes_of(make_own)),
          scratch_(before_ + threads * each_) {}

    auto shared() const {
        Carver carver(scratch_.data());
        return make_shared_(carver);
    }
    auto own(int rank) const {
        Carver carver(scratch_.data() + before_ + rank * each_);
        return make_own_(carver);
    }

  private:
    const MakeShared &make_shared_;
    const MakeOwn &make_own_;
    std::size_t before_, each_;
    Scratch scratch_;
};

// Pixels that are worked on at a time, so many bytes a pixel in all buffers, so that they stay in L1 and L2.
int chunk_pixels(std::ptrdiff_t bytes, int tile_rows);
// Pixels that a product of T has in a tile.
template <class T> int tile_rows(const KernelTable &kernels) {
    return std::is_same_v<T, bf16> ? kernels.bf16_tile_rows : kernels.tile_rows;
}
// Whether those are matrix tiles: no others have so many.
inline bool matrix_tiles(int tile_rows) { return tile_rows == 32; }

// One thread's sums over pixels, of two numbers a channel: float32 within a chunk, float64 over chunks.
class ChannelSums {
  public:
    ChannelSums(Carver &carver, const KernelTable &kernels, int channels)
        : first(carver.take<float>(channels)), second(carver.take<float>(channels)), kernels_(kernels),
          total_(carver.take<double>(2 * static_cast<std::size_t>(channels))), channels_(channels) {}

    float *const first; // of a chunk
    float *const second;

    void clear() { std::fill_n(total_, 2 * channels_, 0.0); }
    // What a kernel has left in first and second.
    void add() { kernels_.train_totals({first, second, nullptr, 0, total_, channels_}); }
    // The same of values less `origin`: added as sum and square.
    void add_moments(const float *origin, std::ptrdiff_t pixels) {
        kernels_.train_totals({first, second, origin, pixels, total_, channels_});
    }
    const double *total() const { return total_; }

  private:
    const KernelTable &kernels_;
    double *total_;
    int channels_;
};

// out[i] = part(0)[i] + part(1)[i] + ... for i in [begin, end), over so many parts.
template <class T, class Y, class Part> void add(const Part &part, int parts, long begin, long end, Y *out) {
    constexpr long kBlock = 64;
    for (long at = begin; at < end; at += kBlock) {
        const long n = std::min(kBlock, end - at);
        T sum[kBlock];
        std::copy_n(part(0) + at, n, sum);
        for (int t = 1; t < parts; ++t) {
            const T *const more = part(t) + at;
            for (long i = 0; i < n; ++i)
                sum[i] += more[i];
        }
        for (long i = 0; i < n; ++i)
            out[at + i] = static_cast<Y>(sum[i]);
    }
}

// The same by all members of the team, after they have all arrived.
template <class T, class Y, class Part> void add_parts(Team &team, const Part &part, std::ptrdiff_t count, Y *out) {
    team.sync();
    long begin, end;
    team.share(static_cast<long>(count), 64, begin, end);
    add<T>(part, team.size(), begin, end, out);
}

// Panels of so many channels.
inline int panels(const KernelTable &kernels, int channels) { return (channels + kernels.panel - 1) / kernels.panel; }

// The kernel for the elements of its arguments.
inline void run(const KernelTable &k, const ActivateArgs &a) { k.train_activate(a); }
inline void run(const KernelTable &k, const ActivateWideArgs &a) { k.train_activate_wide(a); }
inline void run(const KernelTable &k, const ActivateBf16Args &a) { k.train_activate_bf16(a); }
inline void run(const KernelTable &k, const GradientArgs &a) { k.train_gradient(a); }
inline void run(const KernelTable &k, const GradientWideArgs &a) { k.train_gradient_wide(a); }
inline void run(const KernelTable &k, const GradientBf16Args &a) { k.train_gradient_bf16(a); }
inline void run(const KernelTable &k, const SumsArgs &a) { k.train_sums(a); }
inline void run(const KernelTable &k, const SumsNarrowArgs &a) { k.train_sums_narrow(a); }
inline void run(const KernelTable &k, const SumsBf16Args &a) { k.train_sums_bf16(a); }

// Where a layer writes what its kernels give in float before it is rounded: the tensor itself, or a buffer.
inline float *in_float(float *tensor, float *) { return tensor; }
inline float *in_float(bf16 *, float *buffer) { return buffer; }

// The moments of a chunk of z, which is rounded to `tensor` where that is of bf16.
inline void moments_and_round(const KernelTable &k, const MomentsArgs &a, float *) { k.train_moments(a); }
inline void moments_and_round(const KernelTable &k, const MomentsArgs &a, bf16 *tensor) {
    k.train_moments_narrow({a, tensor, a.channels});
}

// What a layer does with pixels of z that its kernels have made: they are rounded to the tensor, where `made` is not
// that itself, and added to the sums, where these are wanted.
template <class T>
void keep(const KernelTable &kernels, const TrainForward<T> &f, ChannelSums &sums, const float *made,
          std::ptrdiff_t pixels, T *z) {
    if (!f.sums && static_cast<const void *>(made) == z)
        return;
    const int c = f.shape.cout;
    moments_and_round(kernels, {made, c, sums.first, sums.second, pixels, c}, z);
    sums.add_moments(made, pixels);
}

// f(from, count) for a member's share of the output pixels, `chunk` of them at a time.
template <class F>
void each_chunk(const Team &team, const KernelTable &kernels, const TrainShape &s, int chunk, const F &f) {
    long begin, end;
    team.share(static_cast<long>(s.out_pixels()), kernels.tile_rows, begin, end);
    for (std::ptrdiff_t at = begin; at < end; at += chunk)
        f(at, std::min<std::ptrdiff_t>(chunk, end - at));
}

// A 1x1 layer's packed weights, of T.
template <class T> class Product {
  public:
    Product(Carver &carver, const KernelTable &kernels, int cin, int cout)
        : kernels_(kernels), cin_(cin), cout_(cout), depth_(std::is_same_v<T, bf16> ? cin + cin % 2 : cin),
          packed_(carver.take<T>(static_cast<std::size_t>(packed_columns(kernels, cout)) * depth_)) {}

    // By all members of the team, which may multiply when this returns.
    void pack(Team &team, const MatrixOf<T> &matrix) {
        long begin, end;
        team.share(panels(), 1, begin, end);
        const int from = static_cast<int>(begin) * kernels_.panel,
                  to = std::min(static_cast<int>(end) * kernels_.panel, cout_);
        T *const out = packed_ + static_cast<std::ptrdiff_t>(from) * depth_;
        if constexpr (std::is_same_v<T, bf16>)
            pack_pairs(kernels_, matrix, cout_, cin_, from, to, out);
        else
            pack_panels(kernels_, matrix, cout_, 0, cin_, from, to, out);
        team.sync();
    }

    // y = x w + residual; both without gaps. `residual`: or null.
    void run(const T *x, std::ptrdiff_t pixels, const T *residual, T *y) const {
        if constexpr (std::is_same_v<T, bf16>)
            kernels_.pointwise_bf16(args(x, pixels, residual, y));
        else
            kernels_.pointwise(args(x, pixels, residual, y));
    }

    // The sums as they are.
    void sums(const T *x, std::ptrdiff_t pixels, float *y) const { multiply(args(x, pixels, no_residual(), y)); }

    // The same into a tensor whose next rows are made next. They come from memory, for which stores would wait: the
    // tiles ask for them meanwhile. A step in float32 takes 3% less so; what bf16 products make is in a buffer.
    void sums_of_chunk(const T *x, std::ptrdiff_t pixels, float *y) const {
        Pointwise<T, T, float> a = args(x, pixels, no_residual(), y);
        a.ahead = y + pixels * cout_;
        a.ahead_size = pixels * cout_;
        multiply(a);
    }

    // act(x w + bias), the bias padded to the panels.
    void activated(const T *x, std::ptrdiff_t pixels, const float *bias, bool relu6, float *y) const {
        Pointwise<T, T, float> a = args(x, pixels, no_residual(), y);
        a.bias = bias;
        a.relu6 = relu6;
        multiply(a);
    }

    // y += x w + bias, which is padded to the panels. Of at most 512 inputs: more are summed in chunks, in y itself.
    void add_sums(const T *x, std::ptrdiff_t pixels, const float *bias, float *y) const {
        Pointwise<T, T, float> a = args(x, pixels, static_cast<const float *>(y), y);
        a.bias = bias;
        multiply(a);
    }

    const T *packed() const { return packed_; }

  private:
    static const float *no_residual() { return nullptr; }
    void multiply(const Pointwise<T, T, float> &a) const {
        if constexpr (std::is_same_v<T, bf16>)
            kernels_.pointwise_bf16_float(a);
        else
            kernels_.pointwise(a);
    }
    int panels() const { return mnv2::panels(kernels_, cout_); }
    template <class Y> Pointwise<T, T, Y> args(const T *x, std::ptrdiff_t pixels, const Y *residual, Y *y) const {
        return {x, cin_, packed_, nullptr, residual, cout_, y, cout_, pixels, cin_, cout_, 0, panels(), false};
    }

    const KernelTable &kernels_;
    int cin_, cout_, depth_;
    T *packed_;
};

template <class T> void train_stem_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads);
template <class T> void train_stem_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads);
template <class T> void train_pointwise_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads);
template <class T> void train_pointwise_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads);
template <class T> void train_depthwise_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads);
template <class T> void train_depthwise_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads);

} // namespace mnv2
