// Memory of activations and gradients, which outlives the tensors in it: the next training step takes it again.
#pragma once

#include "pack.h"

namespace mnv2 {

// `bytes` on a cache line, not initialised, from those that earlier ones gave back. What is kept and what is in use
// together are never more than what was in use at some time. Throws std::bad_alloc.
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

  private:
    std::size_t bytes_;
    std::size_t capacity_;
    Memory memory_;
};

} // namespace mnv2
