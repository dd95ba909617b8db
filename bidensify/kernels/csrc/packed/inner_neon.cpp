// NEON (aarch64): population counts per byte, widened before they overflow.
#include <arm_neon.h>

#include "inner_common.h"
#include "inner_depthwise.h"
#include "inner_finish.h"

namespace bd {
namespace {

inline uint32_t quarter(float32x4_t a, float32x4_t b) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), bits));
}

inline uint32_t at_least(vf a, vf b) {
  return quarter(a.lo.lo, b.lo.lo) | quarter(a.lo.hi, b.lo.hi) << 4 | quarter(a.hi.lo, b.hi.lo) << 8 |
         quarter(a.hi.hi, b.hi.hi) << 12;
}

inline void counts_from_planes(const uint32_t (*planes)[kLanes], int bits, int32_t* counts) {
  counts_from_many_planes(planes, bits, counts);
}

// A byte counts up to 8, or with two planes up to 24, per word.
template <int Planes, int P>
void block(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w,
           int32_t* counts, int64_t count_step) {
  constexpr int64_t words = Planes == 1 ? 31 : 10;
  uint32x4_t wide[P][4];
  uint8x16_t acc[P][4];
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < 4; ++q) wide[p][q] = vdupq_n_u32(0);
  for (int64_t s = 0; s < n; ++s) {
    const uint32_t* ap = a + segments[s].a;
    const uint32_t* wp = w + segments[s].w;
    for (int64_t t = 0; t < segments[s].n;) {
      const int64_t end = t + words < segments[s].n ? t + words : segments[s].n;
      for (int p = 0; p < P; ++p)
        for (int q = 0; q < 4; ++q) acc[p][q] = vdupq_n_u8(0);
      for (; t < end; ++t, wp += kLanes) {
        for (int q = 0; q < 4; ++q) {
          const uint32x4_t weights = vld1q_u32(wp + 4 * q);
          for (int p = 0; p < P; ++p) {
            const uint32x4_t x = veorq_u32(vdupq_n_u32(ap[p * a_step + t]), weights);
            const uint8x16_t found = vcntq_u8(vreinterpretq_u8_u32(x));
            if (Planes == 1) {
              acc[p][q] = vaddq_u8(acc[p][q], found);
            } else {
              const uint32x4_t y = veorq_u32(vdupq_n_u32(ap[second + p * a_step + t]), weights);
              acc[p][q] = vmlaq_u8(vaddq_u8(acc[p][q], vcntq_u8(vreinterpretq_u8_u32(y))), found, vdupq_n_u8(2));
            }
          }
        }
      }
      for (int p = 0; p < P; ++p)
        for (int q = 0; q < 4; ++q) wide[p][q] = vpadalq_u16(wide[p][q], vpaddlq_u8(acc[p][q]));
    }
  }
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < 4; ++q) vst1q_u32((uint32_t*)counts + p * count_step + 4 * q, wide[p][q]);
}

template <int Planes>
void gemm_of(const uint32_t* a, int64_t second, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w,
             int64_t tile_step, int pixels, int channels, int32_t* counts, int64_t count_step) {
  for (int v = 0; v * kLanes < channels; ++v, w += tile_step, counts += kLanes) {
    switch (pixels) {
      case 1: block<Planes, 1>(a, second, a_step, s, n, w, counts, count_step); break;
      case 2: block<Planes, 2>(a, second, a_step, s, n, w, counts, count_step); break;
      case 3: block<Planes, 3>(a, second, a_step, s, n, w, counts, count_step); break;
      default: block<Planes, 4>(a, second, a_step, s, n, w, counts, count_step); break;
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

const Inner* neon_inner() { return &kInner; }

}  // namespace bd
