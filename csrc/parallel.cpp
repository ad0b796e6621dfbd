#include "parallel.h"

#include <algorithm>

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mnv2 {
namespace {

std::atomic<bool> forked{false};

// libgomp's pool does not survive a fork: a region in the child would wait for threads that are not there.
struct ForkGuard {
    ForkGuard() {
        pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
    }
} const guard;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// About 60 us of spinning, longer than threads differ when each has a core; then the core is offered to others at each
// look. Sleeping in the kernel instead was no faster beside a busy neighbour (12 ms a call either way).
constexpr int kSpins = 4000;

} // namespace

void Team::sync() {
    if (size_ == 1)
        return;
    expected_ += size_;
    std::atomic<int> &arrived = counts_->arrived;
    arrived.fetch_add(1, std::memory_order_acq_rel);
    for (int spins = 0; arrived.load(std::memory_order_acquire) < expected_; ++spins) {
        if (spins < kSpins)
            relax();
        else
            sched_yield();
    }
}

bool forked_child() { return forked.load(std::memory_order_relaxed); }

int usable_threads(int requested) { return forked_child() ? 1 : std::clamp(requested, 1, kMaxThreads); }

int default_threads() { return usable_threads(omp_get_max_threads()); }

int openmp_version() { return _OPENMP; }

void run_team(int threads, void (*body)(Team &, void *), void *context) {
    threads = usable_threads(threads);
    if (threads == 1) {
        Team team = Team::solo();
        body(team, context);
        return;
    }
    TeamCounts counts;
#pragma omp parallel num_threads(threads)
    {
        // OpenMP may give fewer threads than asked for (nested regions, thread limits).
        Team team(omp_get_num_threads(), omp_get_thread_num(), &counts);
        body(team, context);
    }
}

} // namespace mnv2
