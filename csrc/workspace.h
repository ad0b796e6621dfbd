// What a network keeps between calls: plans and memory, for any number of threads that call at once.
//
// In a child of fork a mutex may be locked for ever: there plans are made anew, and memory comes from the system and
// goes back to it.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "pack.h"
#include "parallel.h"

namespace mnv2 {

// The plans of the image sizes that were last asked for. A Plan has h, w and threads.
template <class Plan> class Plans {
  public:
    // make(): the plan for these, where none is kept.
    template <class Make> std::shared_ptr<const Plan> get(int h, int w, int threads, const Make &make) {
        if (forked_child())
            return std::make_shared<const Plan>(make());
        const std::lock_guard<std::mutex> lock(mutex_);
        for (std::size_t i = 0; i < plans_.size(); ++i)
            if (plans_[i]->h == h && plans_[i]->w == w && plans_[i]->threads == threads) {
                std::rotate(plans_.begin(), plans_.begin() + i, plans_.begin() + i + 1); // most recent first
                return plans_.front();
            }
        auto made = std::make_shared<const Plan>(make());
        if (plans_.size() == kPlans)
            plans_.pop_back();
        plans_.insert(plans_.begin(), std::move(made));
        return plans_.front();
    }

    std::size_t size() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return plans_.size();
    }

  private:
    static constexpr std::size_t kPlans = 8;
    mutable std::mutex mutex_;
    std::vector<std::shared_ptr<const Plan>> plans_;
};

struct Workspace {
    std::size_t capacity = 0;
    Memory memory;
};

// Memory of calls that are done, for later ones.
class Workspaces {
  public:
    Workspaces() { free_.reserve(kKept); } // so that giving back after the work cannot fail

    // At least `bytes`. Throws std::bad_alloc.
    Workspace take(std::size_t bytes) {
        Workspace found;
        if (!forked_child()) {
            const std::lock_guard<std::mutex> lock(mutex_);
            // The smallest that is large enough; where none is, the largest makes room for a new one.
            auto best = free_.end();
            for (auto it = free_.begin(); it != free_.end(); ++it)
                if (best == free_.end() ||
                    (best->capacity < bytes ? it->capacity > best->capacity
                                            : it->capacity >= bytes && it->capacity < best->capacity))
                    best = it;
            if (best != free_.end()) {
                found = std::move(*best);
                bytes_ -= found.capacity;
                free_.erase(best);
            }
        }
        if (found.capacity >= bytes && found.memory)
            return found;
        found.memory.reset(); // too small: freed before the larger one is asked for
        return {bytes, allocate(bytes)};
    }

    void give(Workspace workspace) {
        if (forked_child())
            return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.size() == kKept || workspace.capacity > kKeptBytes - bytes_)
            return;
        bytes_ += workspace.capacity;
        free_.push_back(std::move(workspace));
    }

    std::size_t bytes() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return bytes_;
    }

  private:
    static constexpr std::size_t kKept = 16;
    static constexpr std::size_t kKeptBytes = 256u << 20; // of all that are kept: what is more goes back to the system
    mutable std::mutex mutex_;
    std::vector<Workspace> free_;
    std::size_t bytes_ = 0; // in free_
};

// Bytes of memory for n images: an arena a thread where each has images of its own, or one for all. `plan.arena(t)` is
// what t threads need that share an image.
template <class Plan> std::size_t arena_bytes(const Plan &plan, int n) {
    return std::max(n >= plan.threads ? plan.threads * plan.arena(1) : 0, plan.arena(plan.threads));
}

// One member's part of n images, once a team. Whole ones for itself alone, as they come, so that a core which another
// program slows down takes fewer of them; then, with the others, what is left over. All members give the same `memory`,
// of arena_bytes. run(team, at, begin, end) makes images [begin, end) in the arena at `at`.
template <class Plan, class Byte, class Run>
void share_images(Team &team, const Plan &plan, int n, Byte *memory, const Run &run) {
    const int whole = n >= plan.threads ? n - n % team.size() : 0;
    Team alone = Team::solo();
    Byte *const own = memory + team.rank() * plan.arena(1);
    if (team.size() == 1)
        run(alone, own, 0, whole);
    else
        for (int k = team.take(); k < whole; k = team.take())
            run(alone, own, k, k + 1);
    if (whole > 0)
        team.sync();
    if (whole < n)
        run(team, memory, whole, n);
}

} // namespace mnv2
