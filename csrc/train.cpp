#include "train_run.h"

#include <cmath>

namespace mnv2 {

Workspaces &Scratch::pool() {
    static Workspaces workspaces;
    return workspaces;
}

int chunk_pixels(std::ptrdiff_t bytes, int tile_rows) {
    constexpr std::ptrdiff_t kBytes = 64 * 1024;
    // 56: a multiple of every other tile's height but AVX2's.
    const std::ptrdiff_t unit = matrix_tiles(tile_rows) ? 64 : 56;
    return static_cast<int>(std::clamp<std::ptrdiff_t>(kBytes / bytes / unit * unit, unit, 4 * unit));
}

namespace {

constexpr long kChunk = 256; // pixels of a chunk where nothing is kept between its steps

} // namespace

template <class T> void train_activate(const KernelTable &kernels, const TrainActivate<T> &a, int threads) {
    parallel(threads, [&](Team &team) {
        long begin, end;
        team.share(static_cast<long>(a.pixels), 1, begin, end);
        const std::ptrdiff_t at = begin * static_cast<std::ptrdiff_t>(a.channels);
        run(kernels, Activate<T, T>{a.z + at, a.channels, a.norm, a.residual ? a.residual + at : nullptr, a.channels,
                                    a.y + at, a.channels, end - begin, a.channels});
    });
}

template <class T> void train_sums(const KernelTable &kernels, const TrainSums<T> &s, int threads) {
    threads = usable_threads(threads);
    const auto none = [](Carver &) { return nullptr; };
    const auto make = [&](Carver &carver) { return ChannelSums(carver, kernels, s.channels); };
    const TeamMemory memory(threads, none, make);
    parallel(threads, [&](Team &team) {
        ChannelSums sums = memory.own(team.rank());
        sums.clear();
        long begin, end;
        team.share(static_cast<long>(s.pixels), 1, begin, end);
        for (long at = begin; at < end; at += kChunk) {
            const std::ptrdiff_t from = at * static_cast<std::ptrdiff_t>(s.channels);
            run(kernels, Sums<T, T>{s.g + from, s.channels, s.z + from, s.channels, s.norm, nullptr, 0, false,
                                    sums.first, sums.second, std::min(kChunk, end - at), s.channels});
            sums.add();
        }
        add_parts<double>(team, [&](int t) { return memory.own(t).total(); }, 2 * s.channels, s.sums);
    });
}

void train_norm(const TrainNorm &n, std::ptrdiff_t pixels) {
    for (int c = 0; c < n.channels; ++c) {
        double &mean = n.moments[c], &variance = n.moments[n.channels + c];
        if (pixels > 0) {
            mean /= static_cast<double>(pixels);
            // Rounding may leave less than nothing of a constant channel; a NaN stays.
            variance = variance / static_cast<double>(pixels) - mean * mean;
            if (variance < 0)
                variance = 0;
        }
        const double scale = (n.gamma ? n.gamma[c] : 1.0) / std::sqrt(variance + n.eps);
        n.norm[c] = static_cast<float>(mean);
        n.norm[n.channels + c] = static_cast<float>(scale);
        n.norm[2 * n.channels + c] = static_cast<float>((n.beta ? n.beta[c] : 0.0) - mean * scale);
    }
}

void train_running(const double *moments, std::ptrdiff_t pixels, double share, float *mean, float *variance,
                   int channels) {
    const double count = static_cast<double>(pixels), unbiased = count / (count - 1);
    for (int c = 0; c < channels; ++c) {
        mean[c] = static_cast<float>((1 - share) * mean[c] + share * moments[c]);
        variance[c] = static_cast<float>((1 - share) * variance[c] + share * unbiased * moments[channels + c]);
    }
}

void train_norm_gradient(const TrainNormGradient &n) {
    for (int c = 0; c < n.channels; ++c) {
        const double sum = n.sums[c], mean = n.moments[c];
        const double inverse = 1 / std::sqrt(n.moments[n.channels + c] + n.eps);
        const double scale = (n.gamma ? n.gamma[c] : 1.0) * inverse;
        // The kernels' mean is rounded to float32.
        const double dgamma = inverse * (n.sums[n.channels + c] + (n.norm[c] - mean) * sum);
        const double share = n.pixels > 0 ? scale / static_cast<double>(n.pixels) : 0.0;
        n.coefficients[c] = static_cast<float>(scale);
        n.coefficients[n.channels + c] = static_cast<float>(-share * inverse * dgamma);
        n.coefficients[2 * n.channels + c] = static_cast<float>(share * (mean * inverse * dgamma - sum));
        n.dgamma[c] = static_cast<float>(dgamma);
        n.dbeta[c] = static_cast<float>(sum);
    }
}

template <class T> void train_forward(const KernelTable &kernels, const TrainForward<T> &f, int threads) {
    threads = usable_threads(threads);
    if (f.shape.kind == TrainKind::depthwise)
        train_depthwise_forward(kernels, f, threads);
    else if (f.shape.kind == TrainKind::stem)
        train_stem_forward(kernels, f, threads);
    else
        train_pointwise_forward(kernels, f, threads);
}

template <class T> void train_backward(const KernelTable &kernels, const TrainBackward<T> &b, int threads) {
    threads = usable_threads(threads);
    if (b.shape.kind == TrainKind::depthwise)
        train_depthwise_backward(kernels, b, threads);
    else if (b.shape.kind == TrainKind::stem)
        train_stem_backward(kernels, b, threads);
    else
        train_pointwise_backward(kernels, b, threads);
}

template void train_activate(const KernelTable &, const TrainActivate<float> &, int);
template void train_activate(const KernelTable &, const TrainActivate<bf16> &, int);
template void train_sums(const KernelTable &, const TrainSums<float> &, int);
template void train_sums(const KernelTable &, const TrainSums<bf16> &, int);
template void train_forward(const KernelTable &, const TrainForward<float> &, int);
template void train_forward(const KernelTable &, const TrainForward<bf16> &, int);
template void train_backward(const KernelTable &, const TrainBackward<float> &, int);
template void train_backward(const KernelTable &, const TrainBackward<bf16> &, int);

} // namespace mnv2
