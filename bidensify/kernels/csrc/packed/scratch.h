// Memory of a layer in flight.
#ifndef BIDENSIFY_SCRATCH_H
#define BIDENSIFY_SCRATCH_H

#include <stdint.h>
#include <stdlib.h>

#include <new>
#include <vector>

#include "layer.h"

namespace bd {

// Memory that a thread keeps from layer to layer.
struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  ~Buffer() { free(data); }
  char* get(size_t wanted) {
    if (wanted > size) {
      free(data);
      data = nullptr;
      size = 0;
      void* fresh = nullptr;
      if (posix_memalign(&fresh, 64, wanted) != 0) throw std::bad_alloc();
      data = static_cast<char*>(fresh);
      size = wanted;
    }
    return data;
  }
};

// Of the thread at work: rows, sums.
extern thread_local Buffer row_buffer;

// Memory that is asked for a share at a time, well before it is used.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0, share = 0;
  void set(const char* from, int64_t bytes, int64_t steps) {
    at = from;
    lines = (bytes + 63) / 64;
    share = (lines + steps - 1) / steps;
  }
  template <int Write>
  void step() {
    for (int64_t i = 0; i < share && lines > 0; ++i, --lines, at += 64) __builtin_prefetch(at, Write, 2);
  }
};

struct Layer::Scratch {
  Ahead x_ahead, y_ahead;      // what the last step of the next row reads and writes
  float* buffer;               // (row pixels, cout) of the bypass and what else is added before the activation
  float* early;                // (row pixels, cout) of what joins before the activation where the bypass joins behind it
  float* windows;              // (row pixels, groups) sums of the binarized activations under each window
  float* pixel;                // (cin)
  char* room;                  // the pixels that the bypass of a row reads, where x lies in parts
  const void** source;         // (row pixels), in the order of the runs
  int32_t* kvalid;             // (row pixels rounded up), depthwise
  std::vector<Tap> rows;
  std::vector<Segment> segments;
  std::vector<const void*> window;
  std::vector<const uint32_t*> taps, valid;
  std::vector<const uint32_t*> taps2;  // of the second plane
  std::vector<uint32_t> weights, ones;
  std::vector<float> sums;
};

}  // namespace bd
#endif
