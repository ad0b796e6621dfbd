#include "train_buffer.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "pack.h"
#include "parallel.h"

namespace mnv2 {
namespace {

struct Block {
    std::size_t capacity;
    Pages memory;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> free; // the one given back first comes first
    std::size_t kept = 0, used = 0, most = 0;
    std::size_t live = 0; // blocks in use

    // The smallest that fits and wastes no more than an eighth, or none.
    Pages take(std::size_t bytes, std::size_t &capacity) {
        auto best = free.end();
        for (auto it = free.begin(); it != free.end(); ++it)
            if (it->capacity >= bytes && it->capacity - bytes <= bytes / 8 &&
                (best == free.end() || it->capacity < best->capacity))
                best = it;
        if (best == free.end())
            return nullptr;
        capacity = best->capacity;
        Pages memory = std::move(best->memory);
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

// On pages of 2 MB where there is room for some: a training step takes 570 ms so, 640 on those of 4 KB.
Pages map_pages(std::size_t bytes) {
    constexpr std::size_t kLarge = 2 << 20;
    if (bytes > SIZE_MAX / 2)
        throw std::bad_alloc();
    const bool large = bytes >= 2 * kLarge;
    const std::size_t whole = large ? (bytes + kLarge - 1) / kLarge * kLarge : bytes;
    const std::size_t asked = large ? whole + kLarge : whole; // some of it lies on a border
    void *const found = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        throw std::bad_alloc();
    auto *const pages = static_cast<std::byte *>(found);
    if (!large)
        return Pages(pages, Unmap{whole});
    const std::size_t before = (kLarge - reinterpret_cast<std::uintptr_t>(pages) % kLarge) % kLarge;
    if (before)
        munmap(pages, before);
    munmap(pages + before + whole, kLarge - before);
    madvise(pages + before, whole, MADV_HUGEPAGE); // a wish
    return Pages(pages + before, Unmap{whole});
}

// Never destroyed: a tensor may die after everything else of a process.
Pool &pool() {
    static Pool *const made = new Pool;
    return *made;
}

} // namespace

void Unmap::operator()(std::byte *pages) const { munmap(pages, bytes); }

TrainBuffer::TrainBuffer(std::size_t bytes) : bytes_(bytes), capacity_(whole_lines(std::max<std::size_t>(bytes, 1))) {
    if (forked_child()) { // the lock may be held for ever there
        memory_ = map_pages(capacity_);
        return;
    }
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.free.reserve(p.free.size() + p.live + 1); // so that giving back cannot fail
    memory_ = p.take(bytes, capacity_);
    const std::size_t used = p.used + capacity_, most = std::max(p.most, used);
    p.drop_all_but(most - used);
    if (!memory_)
        memory_ = map_pages(capacity_);
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

std::size_t TrainBuffer::release() {
    if (forked_child())
        return 0;
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    const std::size_t released = p.kept;
    p.drop_all_but(0);
    p.most = p.used;
    return released;
}

} // namespace mnv2
