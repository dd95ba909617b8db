// AVX2: see inner_avx2_blocks.h for the popcounts.
#include <immintrin.h>

#include "inner_avx2_blocks.h"
#include "inner_common.h"
#include "inner_depthwise.h"
#include "inner_finish.h"

namespace bd {
namespace {

inline uint32_t at_least(vf a, vf b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)) |
         ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)) << 8);
}

inline void counts_from_planes(const uint32_t (*planes)[kLanes], int bits, int32_t* counts) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3,
                                          3, 3, 3, 3);
  const __m256i mask = _mm256_set1_epi64x((int64_t)0x8040201008040201ull);
  for (int p = 0; p < kLanes; ++p, counts += 2 * kLanes) {
    __m256i sum = _mm256_setzero_si256();
    for (int bit = 0; bit < bits; ++bit) {
      const __m256i word = _mm256_shuffle_epi8(_mm256_set1_epi32((int)planes[bit][p]), spread);
      const __m256i hit = _mm256_cmpeq_epi8(_mm256_and_si256(word, mask), mask);
      sum = _mm256_add_epi8(sum, _mm256_and_si256(hit, _mm256_set1_epi8((char)(1 << bit))));
    }
    const __m128i low = _mm256_castsi256_si128(sum), high = _mm256_extracti128_si256(sum, 1);
    _mm256_storeu_si256((__m256i*)counts, _mm256_cvtepu8_epi32(low));
    _mm256_storeu_si256((__m256i*)(counts + 8), _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)));
    _mm256_storeu_si256((__m256i*)(counts + 16), _mm256_cvtepu8_epi32(high));
    _mm256_storeu_si256((__m256i*)(counts + 24), _mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)));
  }
}

// Byte j of the first plane's words becomes the low pieces of both planes' byte j, that of the second plane's the high ones:
// one lookup then counts both planes.
void merge(uint32_t* first, uint32_t* second, int64_t n) {
  constexpr uint32_t low = 0x0f0f0f0fu;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t a = first[i], b = second[i];
    first[i] = (a & low) | (b & low) << 4;
    second[i] = (a >> 4 & low) | (b & ~low);
  }
}

// Word t of a 32-channel tile becomes eight rows of 32 bytes: the low and the high pieces of byte j of each channel's word,
// apart, as the lookup takes them.
void arrange(const uint32_t* tiles, int64_t count, int64_t depth, int64_t first, int64_t last, uint32_t* out) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i piece = _mm256_set1_epi8(15);
  const int64_t pairs = (count + 1) / 2;
  for (int64_t at = first; at < last; ++at) {
    const int64_t pair = at / depth % pairs;
    const uint32_t* even = tiles + ((at / depth / pairs * count + 2 * pair) * depth + at % depth) * kLanes;
    const uint32_t* odd = 2 * pair + 1 < count ? even + depth * kLanes : nullptr;
    // Four words of either tile, their bytes sorted: then a transposition of 4 x 4 groups of bytes in each half.
    __m256i v[4];
    for (int i = 0; i < 4; ++i) {
      const __m128i low = _mm_loadu_si128((const __m128i*)(even + 4 * i));
      const __m128i high = odd ? _mm_loadu_si128((const __m128i*)(odd + 4 * i)) : _mm_setzero_si128();
      v[i] = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), bytes);
    }
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
    const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    const __m256i rows[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b), _mm256_unpacklo_epi64(c, d),
                             _mm256_unpackhi_epi64(c, d)};
    __m256i* to = (__m256i*)(out + at * 2 * kTile);
    for (int j = 0; j < 4; ++j) {
      const __m256i low = _mm256_and_si256(rows[j], piece), high = _mm256_and_si256(_mm256_srli_epi16(rows[j], 4), piece);
      // A tile of at most 16 channels is narrow: both pieces in one register, for both tables in one.
      _mm256_storeu_si256(to + 2 * j, odd ? low : _mm256_permute2x128_si256(low, high, 0x20));
      if (odd) _mm256_storeu_si256(to + 2 * j + 1, high);
    }
  }
}

template <int Planes>
inline __attribute__((always_inline)) void gemm_of(const uint32_t* a, int64_t second, int64_t a_step, const Segment* s,
                                                   int64_t n, const uint32_t* w, int64_t tile_step, int pixels, int channels,
                                                   int32_t* counts, int64_t count_step) {
  if (channels > kTile / 2 && pixels <= kAtOnce) {
    if (channels > kTile + kTile / 2)
      return few_blocks<Planes, 2>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
    few_blocks<Planes, 1>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
    if (channels > kTile)
      blocks<Planes, 1, true>(pixels, a, second, a_step, s, n, w + tile_step, tile_step, counts + kTile, count_step);
    return;
  }
  if (channels > kTile + kTile / 2)
    return blocks<Planes, 2, false>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
  if (channels > kTile / 2) blocks<Planes, 1, false>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
  if (channels <= kTile / 2) return blocks<Planes, 1, true>(pixels, a, second, a_step, s, n, w, tile_step, counts, count_step);
  if (channels > kTile)
    blocks<Planes, 1, true>(pixels, a, second, a_step, s, n, w + tile_step, tile_step, counts + kTile, count_step);
}

void gemm(const uint32_t* a, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w, int64_t tile_step, int pixels,
          int channels, int32_t* counts, int64_t count_step) {
  gemm_of<1>(a, 0, a_step, s, n, w, tile_step, pixels, channels, counts, count_step);
}

void gemm2(const uint32_t* a, int64_t second, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w,
           int64_t tile_step, int pixels, int channels, int32_t* counts, int64_t count_step) {
  gemm_of<2>(a, second, a_step, s, n, w, tile_step, pixels, channels, counts, count_step);
}

const Inner kInner = {kPixels, kTiles, kPixels, kAtOnce, kTile, 2 * kTile, true, arrange, sum_pixels, pack_pixels, measure_pixels,
                      pack2_pixels, merge, gemm, gemm2, depthwise_counts, finish_block, average_pixels, fuse_pixel,
                      accumulate_row};

}  // namespace

const Inner* avx2_inner() { return &kInner; }

}  // namespace bd
