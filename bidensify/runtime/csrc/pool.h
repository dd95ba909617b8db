// One small pool of worker threads for the whole process, or the threads of an OpenMP runtime that is there already.
#ifndef BIDENSIFY_POOL_H
#define BIDENSIFY_POOL_H

#include <stdint.h>

namespace bd {

typedef void (*Task)(void* context, int64_t unit);

// Calls task(context, i) for i in 0..units-1 on up to `threads` threads, the caller's among them, and returns when all
// are done. While another caller has the pool, this one works alone: there are never more threads than one caller asked for.
void parallel(int threads, int64_t units, Task task, void* context);

// GOMP_parallel of an OpenMP runtime, or null for the pool.
typedef void (*Runtime)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void set_runtime(Runtime runtime);

template <class F>
void parallel_for(int threads, int64_t units, F& f) {
  parallel(threads, units, [](void* c, int64_t i) { (*static_cast<F*>(c))(i); }, &f);
}

}  // namespace bd
#endif
