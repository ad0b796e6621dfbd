// All threading of the extension. OpenMP is the pool, so that it is torch's pool where torch brought the runtime.
#pragma once

#include <atomic>

namespace mnv2 {

// What the members of a team count together.
struct TeamCounts {
    std::atomic<int> arrived{0}; // calls of sync
    std::atomic<int> taken{0};   // of take
};

// A place in a team of threads that run the same code. `sync` returns when every member has called it.
class Team {
  public:
    Team(int size, int rank, TeamCounts *counts) : size_(size), rank_(rank), counts_(counts) {}
    static Team solo() { return Team(1, 0, nullptr); }

    int size() const { return size_; }
    int rank() const { return rank_; }
    void sync();

    // The next number from 0 on that no member of the team has taken. Not for a team of one.
    int take() { return counts_->taken.fetch_add(1, std::memory_order_relaxed); }

    // This member's share of 0..count-1, in whole multiples of `grain` but for the last.
    void share(long count, long grain, long &begin, long &end) const {
        const long units = (count + grain - 1) / grain;
        begin = units * rank_ / size_ * grain;
        end = units * (rank_ + 1) / size_ * grain;
        if (end > count)
            end = count;
        if (begin > count)
            begin = count;
    }

  private:
    int size_;
    int rank_;
    TeamCounts *counts_;
    int expected_ = 0;
};

// Whether this process is a child of fork: OpenMP's pool and any lock held by another thread did not survive.
bool forked_child();

// Threads that a region asked for `requested` will get: 1 to kMaxThreads, and 1 in a child of fork.
constexpr int kMaxThreads = 1024; // OpenMP's runtime keeps a team on the stack: 100,000 end the process
int usable_threads(int requested);

// Threads OpenMP would use by default, and the version of its specification.
int default_threads();
int openmp_version();

void run_team(int threads, void (*body)(Team &, void *), void *context);

// Calls f(Team &) in `threads` threads, this one among them. f must not throw.
template <class F> void parallel(int threads, F &&f) {
    run_team(threads, [](Team &team, void *context) { (*static_cast<F *>(context))(team); }, &f);
}

} // namespace mnv2
