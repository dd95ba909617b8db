#include "phases.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>

#include "pool.h"

namespace bd {
namespace {

constexpr int kMostSlots = 256;
// A phase's last units end within microseconds of one another, unless somebody else has this thread's core.
constexpr int kSpins = 4000;

// Each on a cache line of its own.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

class Team {
 public:
  Team(int threads, const std::vector<Phase>& phases) : phases_(phases) {
    slots_ = std::max(1, std::min(threads, kMostSlots));
    taken_.reset(new std::atomic<bool>[(size_t)slots_]);
    for (int s = 0; s < slots_; ++s) taken_[s].store(false, std::memory_order_relaxed);
    next_.reset(new Counter[phases.size() * (size_t)slots_]);
    left_.reset(new Counter[phases.size()]);
    for (size_t i = 0; i < phases.size(); ++i) left_[i].value.store(phases[i].units, std::memory_order_relaxed);
  }

  static void enter(void* team) { static_cast<Team*>(team)->work(); }
  bool failed() const { return failed_.load(); }

 private:
  // The share that this thread had in the layer before, or one that nobody has.
  int claim() {
    static thread_local int mine = 0;
    for (int i = 0; i < slots_; ++i) {
      const int slot = (mine + i) % slots_;
      if (!taken_[slot].exchange(true, std::memory_order_relaxed)) {
        if (mine % slots_ != slot) mine = slot;
        return slot;
      }
    }
    return 0;
  }

  void work() {
    const int slot = claim();
    for (int i = 0; i < (int)phases_.size(); ++i) {
      int spins = 0;
      while (open_.load(std::memory_order_acquire) < i) {
        relax();
        if (++spins > kSpins) std::this_thread::yield();
      }
      const Phase& phase = phases_[i];
      int64_t done = 0;
      for (int s = 0; s < slots_; ++s) done += share(phase, i, (slot + s) % slots_);
      if (done > 0 && left_[i].value.fetch_sub(done, std::memory_order_acq_rel) == done) {
        if (phase.after) attempt([&] { phase.after(); });
        open_.store(i + 1, std::memory_order_release);
      }
    }
  }

  // Works on the share of a slot, and returns how many of its units were done here.
  int64_t share(const Phase& phase, int index, int slot) {
    const int64_t first = phase.units * slot / slots_, size = phase.units * (slot + 1) / slots_ - first;
    std::atomic<int64_t>& next = next_[(size_t)index * slots_ + slot].value;
    int64_t done = 0;
    while (next.load(std::memory_order_relaxed) < size) {
      const int64_t at = next.fetch_add(1, std::memory_order_relaxed);
      if (at >= size) break;
      attempt([&] { phase.unit(first + (phase.backwards ? size - 1 - at : at)); });
      ++done;
    }
    return done;
  }

  // An exception must neither leave a thread of another's runtime nor keep the others waiting.
  template <class F>
  void attempt(F f) {
    try {
      f();
    } catch (...) {
      failed_.store(true);
    }
  }

  const std::vector<Phase>& phases_;
  int slots_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
  std::unique_ptr<Counter[]> next_, left_;
  std::atomic<int> open_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace

void run_phases(int threads, const std::vector<Phase>& phases) {
  int64_t most = 1;
  for (const Phase& phase : phases) most = std::max(most, phase.units);
  if (threads > most) threads = (int)most;
  Team team(threads, phases);
  if (threads > 1) {
    parallel(threads, Team::enter, &team);
  } else {
    Team::enter(&team);
  }
  if (team.failed()) throw std::bad_alloc();
}

}  // namespace bd
