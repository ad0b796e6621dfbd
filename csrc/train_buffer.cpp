#include "train_buffer.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "parallel.h"

namespace mnv2 {
namespace {

constexpr std::size_t kLarge = 2 << 20;

std::size_t page() {
    static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

std::size_t round_to(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// On pages of 2 MB where there is room for some: a training step takes 570 ms so, 640 on those of 4 KB.
Pages map_pages(std::size_t bytes) {
    const bool large = bytes >= kLarge;
    const std::size_t whole = round_to(bytes, large ? kLarge : page());
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

// Pages next to each other, in blocks that are in use and free pieces between them. Free pages stay in memory.
class Region {
  public:
    explicit Region(Pages pages) : size_(pages.get_deleter().bytes), pages_(std::move(pages)) {
        free_.push_back({0, size_});
    }

    std::size_t size() const { return size_; }
    bool has(const std::byte *memory) const { return memory >= pages_.get() && memory < pages_.get() + size_; }
    bool unused() const { return blocks_ == 0; }
    std::size_t used() const {
        std::size_t bytes = size_;
        for (const Piece &piece : free_)
            bytes -= piece.bytes;
        return bytes;
    }

    // The first piece that is large enough, or null: what a step gives back last, the next one takes first. Blocks that
    // had pages of their own, for a next one of their size, left 14000 pages of 4 KB to be made anew in each step, a
    // tenth of its time.
    std::byte *take(std::size_t bytes) {
        free_.reserve(blocks_ + 2); // so that giving back cannot fail
        const auto fits = [=](const Piece &piece) { return piece.bytes >= bytes; };
        const auto found = std::find_if(free_.begin(), free_.end(), fits);
        if (found == free_.end())
            return nullptr;
        const std::size_t at = found->at;
        *found = {at + bytes, found->bytes - bytes};
        if (found->bytes == 0)
            free_.erase(found);
        ++blocks_;
        return pages_.get() + at;
    }

    void give(const std::byte *memory, std::size_t bytes) {
        const auto at = static_cast<std::size_t>(memory - pages_.get());
        auto next = std::find_if(free_.begin(), free_.end(), [=](const Piece &piece) { return piece.at > at; });
        if (next != free_.end() && next->at == at + bytes)
            *next = {at, bytes + next->bytes};
        else
            next = free_.insert(next, {at, bytes});
        if (next != free_.begin() && (next - 1)->at + (next - 1)->bytes == at) {
            (next - 1)->bytes += next->bytes;
            free_.erase(next);
        }
        --blocks_;
    }

    // Bytes of free pieces that are in memory: not all of them have been written to.
    std::size_t kept() const {
        std::size_t pages = 0;
        std::vector<unsigned char> present;
        for (const Piece &piece : free_) {
            present.assign(piece.bytes / page(), 0);
            if (mincore(pages_.get() + piece.at, piece.bytes, present.data()) == 0)
                for (const unsigned char page : present)
                    pages += page & 1;
        }
        return pages * page();
    }

    void release() {
        for (const Piece &piece : free_)
            madvise(pages_.get() + piece.at, piece.bytes, MADV_DONTNEED);
    }

  private:
    struct Piece {
        std::size_t at, bytes;
    };

    std::size_t size_, blocks_ = 0;
    std::vector<Piece> free_; // by their places
    Pages pages_;
};

struct Pool {
    std::mutex mutex;
    std::vector<Region> regions;

    std::byte *take(std::size_t bytes) {
        for (Region &region : regions)
            if (std::byte *const found = region.take(bytes))
                return found;
        // A new one is large, so that few pieces are left over; pages that nobody writes to take no memory.
        std::size_t all = 0;
        for (const Region &region : regions)
            all += region.size();
        regions.reserve(regions.size() + 1);
        try {
            regions.emplace_back(map_pages(std::max({bytes, all / 2, kRegion})));
        } catch (const std::bad_alloc &) {
            release();
            regions.emplace_back(map_pages(bytes));
        }
        return regions.back().take(bytes);
    }

    void give(const std::byte *memory, std::size_t bytes) {
        std::find_if(regions.begin(), regions.end(), [=](const Region &region) {
            return region.has(memory);
        })->give(memory, bytes);
    }

    std::size_t used() const {
        std::size_t bytes = 0;
        for (const Region &region : regions)
            bytes += region.used();
        return bytes;
    }

    std::size_t kept() const {
        std::size_t bytes = 0;
        for (const Region &region : regions)
            bytes += region.kept();
        return bytes;
    }

    void release() {
        const auto unused = [](const Region &region) { return region.unused(); };
        regions.erase(std::remove_if(regions.begin(), regions.end(), unused), regions.end());
        for (Region &region : regions)
            region.release();
    }

  private:
    static constexpr std::size_t kRegion = 64 << 20;
};

// Never destroyed: a tensor may die after everything else of a process.
Pool &pool() {
    static Pool *const made = new Pool;
    return *made;
}

// f(pool) under its lock; 0 in a child of fork, which has none.
template <class F> std::size_t of_pool(const F &f) {
    if (forked_child())
        return 0;
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return f(p);
}

std::size_t whole_pages(std::size_t bytes) {
    if (bytes > SIZE_MAX / 2)
        throw std::bad_alloc();
    return round_to(std::max<std::size_t>(bytes, 1), page());
}

} // namespace

void Unmap::operator()(std::byte *pages) const { munmap(pages, bytes); }

TrainBuffer::TrainBuffer(std::size_t bytes) : bytes_(bytes) {
    const std::size_t whole = whole_pages(bytes);
    if (forked_child()) { // the lock may be held for ever there
        own_ = map_pages(whole);
        data_ = own_.get();
        return;
    }
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    data_ = p.take(whole);
}

TrainBuffer::~TrainBuffer() {
    if (forked_child())
        return;
    Pool &p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.give(data_, whole_pages(bytes_));
}

std::size_t TrainBuffer::used() {
    return of_pool([](Pool &p) { return p.used(); });
}

std::size_t TrainBuffer::kept() {
    return of_pool([](Pool &p) { return p.kept(); });
}

std::size_t TrainBuffer::release() {
    return of_pool([](Pool &p) {
        const std::size_t released = p.kept();
        p.release();
        return released;
    });
}

} // namespace mnv2
