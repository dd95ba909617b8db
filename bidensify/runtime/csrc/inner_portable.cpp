// No instruction beyond the compiler's baseline: population counts by masks and shifts on whole vectors.
#include "inner_common.h"

namespace bd {
namespace {

inline uint32_t at_least(vf a, vf b) {
  float x[kLanes], y[kLanes];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(x[i] >= y[i]) << i;
  return mask;
}

inline vi add_where(vi acc, uint32_t mask, int32_t value) {
  const vi bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const vi chosen = (((int32_t)mask & bits) == bits);
  return acc + (chosen & value);
}

// Counts per byte, each at most 8.
inline vu byte_counts(vu v) {
  v -= (v >> 1) & 0x55555555u;
  v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
  return (v + (v >> 4)) & 0x0f0f0f0fu;
}

inline vu widen_counts(vu v) {
  v = (v & 0x00ff00ffu) + ((v >> 8) & 0x00ff00ffu);
  return (v & 0xffffu) + (v >> 16);
}

void gemm(const uint32_t* a, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w, int64_t tile_step,
          int pixels, int tiles, int32_t* counts, int64_t count_step) {
  for (int v = 0; v < tiles; ++v) {
    for (int p = 0; p < pixels; ++p) {
      vu wide = {};
      for (int64_t s = 0; s < n; ++s) {
        const uint32_t* ap = a + segments[s].a + p * a_step;
        const uint32_t* wp = w + segments[s].w + v * tile_step;
        for (int64_t t = 0; t < segments[s].n;) {
          const int64_t end = t + 31 < segments[s].n ? t + 31 : segments[s].n;
          vu acc = {};
          for (; t < end; ++t, wp += kLanes) acc += byte_counts(load_words(wp) ^ ap[t]);
          wide += widen_counts(acc);
        }
      }
      memcpy(counts + p * count_step + v * kLanes, &wide, sizeof wide);
    }
  }
}

const Inner kInner = {4, 4, sum_pixels, pack_pixels, gemm, depthwise_counts, finish_block,
                      average_pixels, fuse_pixel, accumulate_row};

}  // namespace

const Inner* portable_inner() { return &kInner; }

}  // namespace bd
