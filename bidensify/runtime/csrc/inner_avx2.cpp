// AVX2: population counts from a 4-bit table, summed in bytes and widened before they overflow.
#include <immintrin.h>

#include "inner_common.h"

namespace bd {
namespace {

inline uint32_t at_least(vf a, vf b) {
  __m256 a0, a1, b0, b1;
  memcpy(&a0, &a, sizeof a0);
  memcpy(&a1, (const char*)&a + sizeof a0, sizeof a1);
  memcpy(&b0, &b, sizeof b0);
  memcpy(&b1, (const char*)&b + sizeof b0, sizeof b1);
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a0, b0, _CMP_GE_OQ)) |
         ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a1, b1, _CMP_GE_OQ)) << 8);
}

inline vi add_where(vi acc, uint32_t mask, int32_t value) {
  const vi bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const vi chosen = (((int32_t)mask & bits) == bits);
  return acc + (chosen & value);
}

inline __m256i byte_counts(__m256i v, __m256i table, __m256i low) {
  const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
  const __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
  return _mm256_add_epi8(a, b);
}

inline __m256i widen_counts(__m256i bytes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

template <int P>
void block(const uint32_t* a, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w, int32_t* counts,
           int64_t count_step) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3,
                                         2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  __m256i wide[P][2], acc[P][2];
  for (int p = 0; p < P; ++p)
    for (int h = 0; h < 2; ++h) wide[p][h] = _mm256_setzero_si256();
  for (int64_t s = 0; s < n; ++s) {
    const uint32_t* ap = a + segments[s].a;
    const uint32_t* wp = w + segments[s].w;
    for (int64_t t = 0; t < segments[s].n;) {
      // A byte holds 31 counts of at most 8.
      const int64_t end = t + 31 < segments[s].n ? t + 31 : segments[s].n;
      for (int p = 0; p < P; ++p)
        for (int h = 0; h < 2; ++h) acc[p][h] = _mm256_setzero_si256();
      for (; t < end; ++t, wp += kLanes) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)wp), w1 = _mm256_loadu_si256((const __m256i*)(wp + 8));
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const __m256i word = _mm256_set1_epi32((int)ap[p * a_step + t]);
          acc[p][0] = _mm256_add_epi8(acc[p][0], byte_counts(_mm256_xor_si256(word, w0), table, low));
          acc[p][1] = _mm256_add_epi8(acc[p][1], byte_counts(_mm256_xor_si256(word, w1), table, low));
        }
      }
      for (int p = 0; p < P; ++p)
        for (int h = 0; h < 2; ++h) wide[p][h] = _mm256_add_epi32(wide[p][h], widen_counts(acc[p][h]));
    }
  }
  for (int p = 0; p < P; ++p)
    for (int h = 0; h < 2; ++h) _mm256_storeu_si256((__m256i*)(counts + p * count_step + 8 * h), wide[p][h]);
}

void gemm(const uint32_t* a, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w, int64_t tile_step, int pixels,
          int tiles, int32_t* counts, int64_t count_step) {
  for (int v = 0; v < tiles; ++v, w += tile_step, counts += kLanes) {
    switch (pixels) {
      case 1: block<1>(a, a_step, s, n, w, counts, count_step); break;
      case 2: block<2>(a, a_step, s, n, w, counts, count_step); break;
      case 3: block<3>(a, a_step, s, n, w, counts, count_step); break;
      default: block<4>(a, a_step, s, n, w, counts, count_step); break;
    }
  }
}

const Inner kInner = {4, 4, sum_pixels, pack_pixels, gemm, depthwise_counts, finish_block,
                      average_pixels, fuse_pixel, accumulate_row};

}  // namespace

const Inner* avx2_inner() { return &kInner; }

}  // namespace bd
