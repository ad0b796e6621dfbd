// Memory of activations and gradients, which outlives the tensors in it: the next training step takes it again.
#pragma once

#include <cstddef>
#include <memory>

namespace mnv2 {

// Of pages of its own, which go back to the system at once: what the heap takes back it may keep in pieces.
struct Unmap {
    std::size_t bytes = 0;
    void operator()(std::byte *pages) const;
};
using Pages = std::unique_ptr<std::byte[], Unmap>;

// `bytes` on a cache line, not initialised, from those that earlier ones gave back. What is kept and what is in use
// together are never more than what was in use at some time since the last release. Throws std::bad_alloc.
class TrainBuffer {
  public:
    explicit TrainBuffer(std::size_t bytes);
    ~TrainBuffer();
    TrainBuffer(const TrainBuffer &) = delete;
    TrainBuffer &operator=(const TrainBuffer &) = delete;

    std::byte *data() const { return memory_.get(); }
    std::size_t bytes() const { return bytes_; }

    // Bytes that wait for a next one.
    static std::size_t kept();

    // Gives these back to the system; how many they were.
    static std::size_t release();

  private:
    std::size_t bytes_;
    std::size_t capacity_;
    Pages memory_;
};

} // namespace mnv2
