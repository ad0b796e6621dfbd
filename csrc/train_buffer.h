// Memory of activations and gradients, which outlives the tensors in it: the next training step takes it again.
#pragma once

#include <cstddef>
#include <memory>

namespace mnv2 {

// Pages of their own, not the heap's, which keeps pieces that nothing fits.
struct Unmap {
    std::size_t bytes = 0;
    void operator()(std::byte *pages) const;
};
using Pages = std::unique_ptr<std::byte[], Unmap>;

// `bytes` on a page's border, not initialised, at the first place that earlier ones have left. Throws std::bad_alloc.
class TrainBuffer {
  public:
    explicit TrainBuffer(std::size_t bytes);
    ~TrainBuffer();
    TrainBuffer(const TrainBuffer &) = delete;
    TrainBuffer &operator=(const TrainBuffer &) = delete;

    std::byte *data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

    // Bytes of those that live, in whole pages.
    static std::size_t used();

    // Bytes of memory that wait for a next one.
    static std::size_t kept();

    // Gives these back to the system; how many they were.
    static std::size_t release();

  private:
    std::size_t bytes_;
    std::byte *data_;
    Pages own_; // in a child of fork, which leaves alone what all share
};

} // namespace mnv2
