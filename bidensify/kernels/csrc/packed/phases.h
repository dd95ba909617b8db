// Work in phases on one team of threads: a phase starts when the one before is complete. The team is called together once
// for all of them, and each thread begins with the same share of every phase, whose data its own cache still holds.
#ifndef BIDENSIFY_PHASES_H
#define BIDENSIFY_PHASES_H

#include <stdint.h>

#include <functional>
#include <vector>

namespace bd {

struct Phase {
  int64_t units;                       // at least 1
  std::function<void(int64_t)> unit;   // on any thread, in any order; must be safe beside the phase's other units
  std::function<void()> after;         // or empty: run once, when all units are done
  bool backwards = false;              // shares are gone through from their ends
};

// Runs all phases on up to `threads` threads.
// Throws std::bad_alloc where a unit or an `after` threw.
void run_phases(int threads, const std::vector<Phase>& phases);

}  // namespace bd
#endif
