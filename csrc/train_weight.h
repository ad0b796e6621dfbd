// The weights' gradient of a 1x1 convolution, summed over chunks of pixels by one member of a team.
#pragma once

#include "train_run.h"

namespace mnv2 {

// [cout][cin] in rows of ld() floats. T: of the activated input and of dz.
template <class T> class WeightGradient;

template <> class WeightGradient<float> {
  public:
    WeightGradient(Carver &carver, const KernelTable &kernels, int cin, int cout, int chunk)
        : kernels_(kernels), cin_(cin), cout_(cout), chunk_(chunk),
          input_(carver.take<float>(static_cast<std::size_t>(packed_columns(kernels, cin)) * chunk)),
          dw_(carver.take<float>(static_cast<std::size_t>(cout) * cin)) {}

    // A chunk of at most the size that was promised; `first`: nothing was added before.
    void add(const float *dz, const float *x, const Norm &norm, std::ptrdiff_t pixels, bool first) {
        kernels_.train_panels({x, cin_, norm, input_, chunk_, pixels, cin_});
        kernels_.train_weight_gradient({dz, cout_, input_, chunk_, dw_, cin_, pixels, cin_, cout_, !first});
    }
    void clear() { std::fill_n(dw_, static_cast<std::ptrdiff_t>(cout_) * cin_, 0.0f); }
    const float *row(long o) const { return dw_ + o * ld(); }
    std::ptrdiff_t ld() const { return cin_; }

  private:
    const KernelTable &kernels_;
    int cin_, cout_, chunk_;
    float *input_; // activated, in panels
    float *dw_;
};

template <> class WeightGradient<bf16> {
  public:
    WeightGradient(Carver &carver, const KernelTable &kernels, int cin, int cout, int chunk)
        : kernels_(kernels), cin_(cin), cout_(cout), rows_(round_up(cout, kernels.lanes)),
          columns_(round_up(cin, kernels.lanes)),
          row_pairs_(carver.take<bf16>(2 * static_cast<std::size_t>(pairs(chunk)) * rows_)),
          turned_(carver.take<bf16>(2 * static_cast<std::size_t>(pairs(chunk)) * rows_)),
          column_pairs_(carver.take<bf16>(2 * static_cast<std::size_t>(pairs(chunk)) * columns_)),
          dw_(carver.take<float>(static_cast<std::size_t>(rows_) * columns_)) {}

    void add(const bf16 *dz, const bf16 *x, const Norm &norm, std::ptrdiff_t pixels, bool first) {
        kernels_.train_pairs({dz, cout_, Norm(), row_pairs_, rows_, pixels, cout_});
        kernels_.train_pairs({x, cin_, norm, column_pairs_, columns_, pixels, cin_});
        // Pairs beyond the last add nothing: both are zero.
        const std::ptrdiff_t used = (pixels + 1) / 2, all = pairs(pixels);
        std::fill(row_pairs_ + 2 * used * rows_, row_pairs_ + 2 * all * rows_, bf16{});
        std::fill(column_pairs_ + 2 * used * columns_, column_pairs_ + 2 * all * columns_, bf16{});
        kernels_.train_weight_pairs(
            {row_pairs_, column_pairs_, turned_, dw_, rows_, columns_, static_cast<int>(all), !first});
    }
    void clear() { std::fill_n(dw_, static_cast<std::ptrdiff_t>(rows_) * columns_, 0.0f); }
    const float *row(long o) const { return dw_ + o * ld(); }
    std::ptrdiff_t ld() const { return columns_; }

  private:
    // Matrix tiles take 16 pairs at a time; elsewhere so many would be a seventh of the work of a chunk of 56 pixels.
    std::ptrdiff_t pairs(std::ptrdiff_t pixels) const {
        return round_up(static_cast<int>((pixels + 1) / 2), matrix_tiles(tile_rows<bf16>(kernels_)) ? 16 : 1);
    }

    const KernelTable &kernels_;
    int cin_, cout_;
    int rows_, columns_; // cout and cin in whole vectors
    bf16 *row_pairs_, *turned_, *column_pairs_;
    float *dw_;
};

// Adds what all members have, each of(rank), by all of them after they have all arrived.
template <class Of> void add_weights(Team &team, const Of &of, int cin, int cout, float *dw) {
    team.sync();
    long begin, end;
    team.share(cout, 1, begin, end);
    for (long o = begin; o < end; ++o)
        add<float>([&](int t) { return of(t).row(o); }, team.size(), 0, cin, dw + o * cin);
}

} // namespace mnv2
