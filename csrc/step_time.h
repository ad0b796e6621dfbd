// How long the steps of one call take, for who asks.
#pragma once

#include <chrono>

#include "parallel.h"

namespace mnv2 {

// Layers first..last took so long, in this form where they are a block.
template <class Form> struct StepTime {
    int first, last;
    bool block;
    Form form;
    double seconds;
};

// Writes each step's time as the first member of a team sees it, waits included. `seconds` is null where nobody asks.
class StepClock {
  public:
    StepClock(double *seconds, const Team &team)
        : seconds_(team.rank() == 0 ? seconds : nullptr), since_(seconds_ ? now() : 0) {}

    // The step that began when the last one ended.
    void stop(int step) {
        if (!seconds_)
            return;
        const double time = now();
        seconds_[step] = time - since_;
        since_ = time;
    }

  private:
    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    double *const seconds_;
    double since_;
};

} // namespace mnv2
