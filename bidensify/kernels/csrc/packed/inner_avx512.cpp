// AVX-512 with VPOPCNTDQ: 16 output channels per register, a broadcast activation word against them.
#include <immintrin.h>

#define BD_OWN_ADDER 1

#include "lanes.h"

namespace bd {
namespace {

inline vu majority(vu a, vu b, vu c) {
  return (vu)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0xe8);
}
inline vu parity(vu a, vu b, vu c) { return (vu)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96); }
inline vu differ(vu a, vu b, vu valid) {
  return (vu)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)valid, 0x28);
}

}  // namespace
}  // namespace bd

#include "inner_common.h"
#include "inner_depthwise.h"
#include "inner_finish.h"

namespace bd {
namespace {

inline uint32_t at_least(vf a, vf b) { return (uint32_t)_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }

// 64 counters at a time: the words of two neighbouring pixels are the mask of a byte addition.
inline void counts_from_planes(const uint32_t (*planes)[kLanes], int bits, int32_t* counts) {
  for (int p = 0; p < kLanes; p += 2, counts += 4 * kLanes) {
    __m512i sum = _mm512_setzero_si512();
    for (int bit = 0; bit < bits; ++bit) {
      uint64_t mask;
      memcpy(&mask, planes[bit] + p, sizeof mask);
      sum = _mm512_mask_add_epi8(sum, (__mmask64)mask, sum, _mm512_set1_epi8((char)(1 << bit)));
    }
    _mm512_storeu_si512(counts, _mm512_cvtepu8_epi32(_mm512_castsi512_si128(sum)));
    _mm512_storeu_si512(counts + kLanes, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(sum, 1)));
    _mm512_storeu_si512(counts + 2 * kLanes, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(sum, 2)));
    _mm512_storeu_si512(counts + 3 * kLanes, _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32(sum, 3)));
  }
}

// Two planes are twice the rows of activation words against the same registers of weights.
template <int Planes, int P, int V>
void block(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w,
           int64_t tile_step, int32_t* counts, int64_t count_step) {
  __m512i acc[P][V], more[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) acc[p][v] = more[p][v] = _mm512_setzero_si512();
  for (int64_t s = 0; s < n; ++s) {
    const uint32_t* ap = a + segments[s].a;
    const uint32_t* wp = w + segments[s].w;
    for (int64_t t = 0; t < segments[s].n; ++t, wp += kLanes) {
      __m512i weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[v] = _mm512_loadu_si512(wp + v * tile_step);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512i word = _mm512_set1_epi32((int)ap[p * a_step + t]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          acc[p][v] = _mm512_add_epi32(acc[p][v], _mm512_popcnt_epi32(_mm512_xor_si512(word, weights[v])));
        if (Planes == 2) {
          const __m512i other = _mm512_set1_epi32((int)ap[second + p * a_step + t]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            more[p][v] = _mm512_add_epi32(more[p][v], _mm512_popcnt_epi32(_mm512_xor_si512(other, weights[v])));
        }
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) {
      if (Planes == 2) acc[p][v] = _mm512_add_epi32(_mm512_add_epi32(acc[p][v], acc[p][v]), more[p][v]);
      _mm512_storeu_si512(counts + p * count_step + v * kLanes, acc[p][v]);
    }
}

template <int V>
void blocks(int pixels, const uint32_t* a, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w, int64_t tile_step,
            int32_t* counts, int64_t count_step) {
  switch (pixels) {
    case 1: return block<1, 1, V>(a, 0, a_step, s, n, w, tile_step, counts, count_step);
    case 2: return block<1, 2, V>(a, 0, a_step, s, n, w, tile_step, counts, count_step);
    case 3: return block<1, 3, V>(a, 0, a_step, s, n, w, tile_step, counts, count_step);
    case 4: return block<1, 4, V>(a, 0, a_step, s, n, w, tile_step, counts, count_step);
    case 5: return block<1, 5, V>(a, 0, a_step, s, n, w, tile_step, counts, count_step);
    default: return block<1, 6, V>(a, 0, a_step, s, n, w, tile_step, counts, count_step);
  }
}

template <int V>
void blocks2(int pixels, const uint32_t* a, int64_t second, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w,
             int64_t tile_step, int32_t* counts, int64_t count_step) {
  switch (pixels) {
    case 1: return block<2, 1, V>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    case 2: return block<2, 2, V>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    default: return block<2, 3, V>(a, second, a_step, s, n, w, tile_step, counts, count_step);
  }
}

void gemm(const uint32_t* a, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w, int64_t tile_step, int pixels,
          int channels, int32_t* counts, int64_t count_step) {
  switch ((channels + kLanes - 1) / kLanes) {
    case 1: return blocks<1>(pixels, a, a_step, s, n, w, tile_step, counts, count_step);
    case 2: return blocks<2>(pixels, a, a_step, s, n, w, tile_step, counts, count_step);
    case 3: return blocks<3>(pixels, a, a_step, s, n, w, tile_step, counts, count_step);
    default: return blocks<4>(pixels, a, a_step, s, n, w, tile_step, counts, count_step);
  }
}

void gemm2(const uint32_t* a, int64_t second, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w,
           int64_t tile_step, int pixels, int channels, int32_t* counts, int64_t count_step) {
  switch ((channels + kLanes - 1) / kLanes) {
    case 1: return blocks2<1>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
    case 2: return blocks2<2>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
    case 3: return blocks2<3>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
    default: return blocks2<4>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
  }
}

const Inner kInner = {6, 4, 3, 6, kLanes, kLanes, false, nullptr, sum_pixels, pack_pixels, measure_pixels, pack2_pixels, nullptr, gemm,
                      gemm2, depthwise_counts, finish_block, average_pixels, fuse_pixel, accumulate_row};

}  // namespace

const Inner* avx512_inner() { return &kInner; }

}  // namespace bd
