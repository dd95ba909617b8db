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

struct Layer::Scratch {
  float* buffer;               // (row pixels, cout) of the bypass and what else is added before the activation
  float* pixel;                // (cin)
  char* room;                  // the pixels that the bypass of a row reads, where x lies in parts
  const void** source;         // (row pixels), in the order of the runs
  int32_t* kvalid;             // (row pixels rounded up), depthwise
  std::vector<Tap> rows;
  std::vector<Segment> segments;
  std::vector<const void*> window;
  std::vector<const uint32_t*> taps, valid;
  std::vector<uint32_t> weights;
  std::vector<float> sums;
};

}  // namespace bd
#endif
