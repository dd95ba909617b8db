// One small pool of worker threads for the whole process, or the threads of an OpenMP runtime that is there already.
#ifndef BIDENSIFY_POOL_H
#define BIDENSIFY_POOL_H

#include <stdint.h>

namespace bd {

typedef void (*Body)(void* context);

// Calls body(context) on up to `threads` threads at once, the caller's among them, and returns when all are done. There may
// be fewer: while another caller has the pool, this one works alone, so that there are never more threads than one asked for.
void parallel(int threads, Body body, void* context);

// GOMP_parallel of an OpenMP runtime, or null for the pool.
typedef void (*Runtime)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void set_runtime(Runtime runtime);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace bd
#endif
