// What becomes of an expansion whose output nobody keeps without any pixel of it: its sums, from the moments of its
// input, and what these add to its gradients.
#include "train_expand.h"

namespace mnv2 {
namespace {

constexpr int kChunk = 224; // pixels

// One member's moments of x less a number near its mean.
template <class T> class Moments {
  public:
    Moments(Carver &carver, const KernelTable &kernels, int channels)
        : kernels_(kernels), channels_(channels),
          rows_(carver.take<float>(static_cast<std::size_t>(kChunk) * channels)), sums_(carver, kernels, channels),
          center_(carver, channels), products_(carver, kernels, channels, channels, kChunk),
          total_(carver.take<double>(static_cast<std::size_t>(channels) * channels)) {}

    // The number: the mean of pixels from everywhere, which every member finds.
    void start(const T *x, std::ptrdiff_t pixels) {
        const std::ptrdiff_t count = std::min<std::ptrdiff_t>(pixels, kChunk);
        read(x, pixels / count * channels_, count, Norm());
        sums_.clear();
        add_sums(count);
        double *const mean = total_; // which has room for it
        for (int c = 0; c < channels_; ++c)
            mean[c] = sums_.total()[c] / static_cast<double>(count);
        center_.set(mean);
        sums_.clear();
        std::fill_n(total_, static_cast<std::ptrdiff_t>(channels_) * channels_, 0.0);
    }

    void add(const T *x, std::ptrdiff_t count) {
        read(x, channels_, count, center_.norm());
        add_sums(count);
        products_.add(rows_, rows_, Norm(), count, true);
        for (int row = 0; row < channels_; ++row)
            for (int c = 0; c < channels_; ++c)
                total_[static_cast<std::ptrdiff_t>(row) * channels_ + c] += products_.row(row)[c];
    }

    double center(int c) const { return center_.of(c); }
    const double *sums() const { return sums_.total(); }
    const double *products() const { return total_; }

  private:
    void read(const T *x, std::ptrdiff_t x_ld, std::ptrdiff_t count, const Norm &norm) {
        run(kernels_, Activate<T, float>{x, x_ld, norm, nullptr, 0, rows_, channels_, count, channels_});
    }
    void add_sums(std::ptrdiff_t count) {
        kernels_.train_moments({rows_, channels_, sums_.first, sums_.second, count, channels_});
        sums_.add_moments(rows_, count);
    }

    const KernelTable &kernels_;
    int channels_;
    float *rows_;
    ChannelSums sums_;
    Center center_;
    WeightGradient<float> products_; // of a chunk
    double *total_;
};

// What products of the input's channels add up to through a weight, for input k.
template <class T> double through(const double *products, const T *weight, int cin, int k) {
    double sum = 0;
    for (int row = 0; row < cin; ++row)
        sum += products[static_cast<std::ptrdiff_t>(k) * cin + row] * to_float(weight[row]);
    return sum;
}

} // namespace

template <class T>
void train_input_moments(const KernelTable &kernels, const T *x, std::ptrdiff_t pixels, int channels, double *moments,
                         int threads) {
    threads = usable_threads(threads);
    const auto none = [](Carver &) { return nullptr; };
    const auto make = [&](Carver &carver) { return Moments<T>(carver, kernels, channels); };
    const TeamMemory of(threads, none, make);
    double *const mean = moments, *const products = moments + channels;
    parallel(threads, [&](Team &team) {
        Moments<T> own = of.own(team.rank());
        own.start(x, pixels);
        long begin, end;
        team.share(static_cast<long>(pixels), 1, begin, end);
        for (std::ptrdiff_t at = begin; at < end; at += kChunk)
            own.add(x + at * channels, std::min<std::ptrdiff_t>(kChunk, end - at));
        add_parts<double>(team, [&](int t) { return of.own(t).sums(); }, channels, mean);
        add_parts<double>(
            team, [&](int t) { return of.own(t).products(); }, static_cast<std::ptrdiff_t>(channels) * channels,
            products);
    });
    const double count = static_cast<double>(pixels);
    for (int row = 0; row < channels; ++row)
        for (int c = 0; c < channels; ++c)
            products[static_cast<std::ptrdiff_t>(row) * channels + c] -= mean[row] * mean[c] / count;
    const Moments<T> any = of.own(0);
    for (int c = 0; c < channels; ++c)
        mean[c] = any.center(c) + mean[c] / count;
}

template <class T>
void train_expand_sums(const TrainExpand<T> &expand, std::ptrdiff_t pixels, int channels, double *sums) {
    const int cin = expand.cin;
    const double *const mean = expand.moments, *const products = mean + cin;
    const double count = static_cast<double>(pixels);
    for (int c = 0; c < channels; ++c) {
        const T *const weight = expand.weight + static_cast<std::ptrdiff_t>(c) * cin;
        double at = 0, spread = 0;
        for (int k = 0; k < cin; ++k) {
            at += mean[k] * to_float(weight[k]);
            spread += through(products, weight, cin, k) * to_float(weight[k]);
        }
        sums[c] = count * at;
        sums[channels + c] = spread + count * at * at;
    }
}

namespace {

// g' scaled, and what the term of z adds to the weight's gradient. That of the constant adds nothing, since with it the
// gradient's sum is zero, and z and x may be taken less their means. `begun` has the mean rounded.
template <class T> void finish_weight(const TrainExpandFinish<T> &f) {
    const int cin = f.expand.cin;
    const double *const mean = f.expand.moments, *const products = mean ? mean + cin : nullptr;
    for (int c = 0; c < f.channels; ++c) {
        const T *const weight = f.expand.weight + static_cast<std::ptrdiff_t>(c) * cin;
        float *const dw = f.begun.dw + static_cast<std::ptrdiff_t>(c) * cin;
        for (int k = 0; k < cin; ++k) {
            double sum = dw[k];
            if (mean)
                sum += f.sums[c] * (static_cast<float>(mean[k]) - mean[k]);
            sum *= f.scale[c];
            if (mean)
                sum += f.of_z[c] * through(products, weight, cin, k);
            dw[k] = static_cast<float>(sum);
        }
    }
}

template <class T> struct FinishMemory {
    FinishMemory(Carver &carver, const KernelTable &kernels, int cin)
        : matrix(carver.take<T>(static_cast<std::size_t>(cin) * cin)), sum(carver.take<float>(cin)),
          bias(carver.take<float>(round_up(cin, kernels.panel))), product(carver, kernels, cin, cin) {}
    T *matrix; // weight' of_z weight
    float *sum, *bias;
    Product<T> product;

    // In float64. The bias takes away the mean of dx, which is zero, as both parts of it were rounded.
    void make(const KernelTable &kernels, const TrainExpandFinish<T> &f) {
        const int cin = f.expand.cin;
        for (int row = 0; row < cin; ++row) {
            double mean = 0;
            for (int c = 0; c < f.channels; ++c) {
                const T weight = f.expand.weight[static_cast<std::ptrdiff_t>(c) * cin + row];
                mean += to_float(scaled(weight, f.scale[c])) * f.sums[c] / static_cast<double>(f.pixels);
            }
            for (int k = 0; k < cin; ++k) {
                double of_x = 0;
                for (int c = 0; c < f.channels; ++c) {
                    const T *const weight = f.expand.weight + static_cast<std::ptrdiff_t>(c) * cin;
                    of_x += static_cast<double>(to_float(weight[row])) * f.of_z[c] * to_float(weight[k]);
                }
                T &to = matrix[static_cast<std::ptrdiff_t>(row) * cin + k];
                store_rounded(to, of_x);
                mean += to_float(to) * f.expand.moments[k];
            }
            sum[row] = static_cast<float>(-mean);
        }
        pack_bias(kernels, sum, cin, bias);
    }
};

template <class T> void finish_input(const KernelTable &kernels, const TrainExpandFinish<T> &f, int threads) {
    const int cin = f.expand.cin;
    const auto make_shared = [&](Carver &carver) { return FinishMemory<T>(carver, kernels, cin); };
    const auto none = [](Carver &) { return nullptr; };
    const TeamMemory of(threads, make_shared, none);
    FinishMemory<T> memory = of.shared();
    const bool moments = f.expand.moments;
    if (moments)
        memory.make(kernels, f);
    parallel(threads, [&](Team &team) {
        Product<T> product = memory.product;
        if (moments)
            product.pack(team, {memory.matrix, cin, 1});
        long begin, end;
        team.share(static_cast<long>(f.pixels), kernels.tile_rows, begin, end);
        for (std::ptrdiff_t pixel = begin; pixel < end; pixel += kChunk) {
            const std::ptrdiff_t at = pixel * cin, count = std::min<std::ptrdiff_t>(kChunk, end - pixel);
            float *const made = f.begun.dx + at;
            if (moments)
                product.add_sums(f.expand.x + at, count, memory.bias, made);
            if (f.residual)
                run(kernels, Activate<T, float>{f.residual + at, cin, Norm(), made, cin, made, cin, count, cin});
            if constexpr (std::is_same_v<T, bf16>)
                kernels.narrow({made, cin, f.dx + at, cin, count, cin});
        }
    });
}

} // namespace

template <class T> void train_expand_finish(const KernelTable &kernels, const TrainExpandFinish<T> &f, int threads) {
    if (f.begun.dw)
        finish_weight(f);
    const bool whole = std::is_same_v<T, float> && !f.expand.moments && !f.residual;
    if (f.dx && !whole)
        finish_input(kernels, f, usable_threads(threads));
}

template void train_input_moments(const KernelTable &, const float *, std::ptrdiff_t, int, double *, int);
template void train_input_moments(const KernelTable &, const bf16 *, std::ptrdiff_t, int, double *, int);
template void train_expand_sums(const TrainExpand<float> &, std::ptrdiff_t, int, double *);
template void train_expand_sums(const TrainExpand<bf16> &, std::ptrdiff_t, int, double *);
template void train_expand_finish(const KernelTable &, const TrainExpandFinish<float> &, int);
template void train_expand_finish(const KernelTable &, const TrainExpandFinish<bf16> &, int);

} // namespace mnv2
