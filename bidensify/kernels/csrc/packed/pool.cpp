#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace bd {
namespace {

// Layers follow one another within microseconds: a worker looks for the next job for about that long, then sleeps, so
// that it takes no core from torch's own threads.
constexpr int kSpins = 2000;

class Pool {
 public:
  void run(int threads, Body body, void* context) {
    const int helpers = threads - 1;
    while ((int)workers_.size() < helpers) {
      const int index = (int)workers_.size();
      const uint64_t seen = generation_.load();
      workers_.emplace_back([this, index, seen] { work(index, seen); });
      workers_.back().detach();
    }
    body_ = body;
    context_ = context;
    helpers_ = helpers;
    // Every worker reports each generation, also those that have no part in it: none may see the next job's fields early.
    pending_.store((int)workers_.size(), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    body(context);
    int spins = 0;
    while (pending_.load(std::memory_order_acquire) != 0) {
      relax();
      if (++spins > kSpins) std::this_thread::yield();
    }
  }

 private:
  void work(int index, uint64_t seen) {
    for (;;) {
      int spins = 0;
      while (generation_.load(std::memory_order_acquire) == seen && ++spins < kSpins) relax();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      ++seen;
      if (index < helpers_) body_(context_);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> pending_{0};
  Body body_ = nullptr;
  void* context_ = nullptr;
  int helpers_ = 0;
};

std::atomic_flag busy = ATOMIC_FLAG_INIT;
Pool* pool = nullptr;
pid_t owner = 0;
std::atomic<Runtime> outside{nullptr};

}  // namespace

void set_runtime(Runtime runtime) { outside.store(runtime); }

void parallel(int threads, Body body, void* context) {
  const Runtime runtime = outside.load(std::memory_order_relaxed);
  if (threads > 1 && runtime != nullptr) {
    runtime(body, context, (unsigned)threads, 0);
    return;
  }
  const bool alone = threads <= 1 || busy.test_and_set(std::memory_order_acquire);
  if (alone) {
    body(context);
    return;
  }
  // Threads do not survive a fork: the child starts its own pool (and leaves the parent's untouched, never freed).
  if (pool == nullptr || owner != getpid()) {
    pool = new Pool();
    owner = getpid();
  }
  try {
    pool->run(threads, body, context);
  } catch (...) {
    // No thread could be started.
    body(context);
  }
  busy.clear(std::memory_order_release);
}

}  // namespace bd
