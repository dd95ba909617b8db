// No instruction beyond the compiler's baseline: population counts by masks and shifts on whole vectors.
#include "inner_common.h"
#include "inner_depthwise.h"
#include "inner_finish.h"

namespace bd {
namespace {

inline uint32_t at_least(vf a, vf b) {
  float x[kLanes], y[kLanes];
  Memory<vf>::store(x, a);
  Memory<vf>::store(y, b);
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (uint32_t)(x[i] >= y[i]) << i;
  return mask;
}

inline void counts_from_planes(const uint32_t (*planes)[kLanes], int bits, int32_t* counts) {
  counts_from_many_planes(planes, bits, counts);
}

// Counts per byte, each at most 8.
inline vu byte_counts(vu v) {
  v -= (v >> 1) & splat(0x55555555u);
  v = (v & splat(0x33333333u)) + ((v >> 2) & splat(0x33333333u));
  return (v + (v >> 4)) & splat(0x0f0f0f0fu);
}

inline vu widen_counts(vu v) {
  v = (v & splat(0x00ff00ffu)) + ((v >> 8) & splat(0x00ff00ffu));
  return (v & splat(0xffffu)) + (v >> 16);
}

// A byte counts up to 8, or with two planes up to 24, per word.
template <int Planes>
void gemm_of(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w,
             int64_t tile_step, int pixels, int channels, int32_t* counts, int64_t count_step) {
  constexpr int64_t words = Planes == 1 ? 31 : 10;
  for (int v = 0; v * kLanes < channels; ++v) {
    for (int p = 0; p < pixels; ++p) {
      vu wide = {};
      for (int64_t s = 0; s < n; ++s) {
        const uint32_t* ap = a + segments[s].a + p * a_step;
        const uint32_t* wp = w + segments[s].w + v * tile_step;
        for (int64_t t = 0; t < segments[s].n;) {
          const int64_t end = t + words < segments[s].n ? t + words : segments[s].n;
          vu acc = {};
          for (; t < end; ++t, wp += kLanes) {
            const vu weights = load_words(wp), found = byte_counts(weights ^ splat(ap[t]));
            acc += Planes == 1 ? found : found + found + byte_counts(weights ^ splat(ap[second + t]));
          }
          wide += widen_counts(acc);
        }
      }
      Memory<vu>::store(counts + p * count_step + v * kLanes, wide);
    }
  }
}

void gemm(const uint32_t* a, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w, int64_t tile_step, int pixels,
          int channels, int32_t* counts, int64_t count_step) {
  gemm_of<1>(a, 0, a_step, s, n, w, tile_step, pixels, channels, counts, count_step);
}

const Inner kInner = {4, 4, 4, 4, kLanes, kLanes, false, nullptr, sum_pixels, pack_pixels, measure_pixels, pack2_pixels, nullptr, gemm,
                      gemm_of<2>, depthwise_counts, finish_block, average_pixels, fuse_pixel, accumulate_row};

}  // namespace

const Inner* portable_inner() { return &kInner; }

}  // namespace bd
