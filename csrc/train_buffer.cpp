#include "train_buffer.h"

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "parallel.h"

namespace mnv2 {
namespace {

struct Block {
    std::size_t capacity;
    Memory memory;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> free; // the one given back first comes first
    std::size_t kept = 0, used = 0, most = 0;
    std::size_t live = 0; // blocks in use

    // The smallest that fits and wastes no more than an eighth, or none.
    Memory take(std::size_t bytes, std::size_t &capacity) {
        auto best = free.end();
        for (auto it = free.begin(); it != free.end(); ++it)
            if (it->capacity >= bytes && it->capacity - bytes <= bytes / 8 &&
                (best == free.end() || it->capacity < best->capacity))
                best = it;
        if (best == free.end())
            return nullptr;
        capacity = best->capacity;
        Memory memory = std::move(best->memory);
        kept -= capacity;
        free.erase(best);
        return memory;
    }

    void drop_all_but(std::size_t bytes) {
        auto it = free.begin();
        for (; it != free.end() && kept > bytes; ++it)
            kept -= it->capacity;
        free.erase(free.begin(), it);
    }
};

// Memory on pages of 2 MB where there is room for some: a training step takes 570 ms so, 640 on those of 4 KB.
Memory large_pages(std::size_t bytes) {
    constexpr std::size_t kPage = 2 << 20;
    if (bytes < 2 * kPage)
        return allocate(bytes);
    const std::size_t whole = (bytes + kPage - 1) / kPage * kPage;
    auto *const memory = static_cast<std::byte *>(std::aligned_alloc(kPage, whole));
    if (!memory)
        throw std::bad_alloc();
    madvise(memory, whole, MADV_HUGEPAGE); // a wish
    return Memory(memory);
}

// Never destroyed: a tensor may die after everything else of a process.
Pool &pool() {
    static Pool *const made = new Pool;
    return *made;
}

} // namespace

TrainBuffer::TrainBuffer(std::size_t bytes) : bytes_(bytes), capacity_(whole_lines(std::max<std::size_t>(bytes, 1))) {
    if (forked_child()) { // the lock may be held for ever there
        memory_ = allocate(capacity_);
        return;
    }
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.free.reserve(p.free.size() + p.live + 1); // so that giving back cannot fail
    memory_ = p.take(bytes, capacity_);
    const std::size_t used = p.used + capacity_, most = std::max(p.most, used);
    p.drop_all_but(most - used);
    if (!memory_)
        memory_ = large_pages(capacity_);
    p.used = used;
    ++p.live;
    p.most = most;
}

TrainBuffer::~TrainBuffer() {
    if (forked_child())
        return;
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.used -= capacity_;
    --p.live;
    p.kept += capacity_;
    p.free.push_back({capacity_, std::move(memory_)});
}

std::size_t TrainBuffer::kept() {
    if (forked_child())
        return 0;
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return p.kept;
}

} // namespace mnv2
