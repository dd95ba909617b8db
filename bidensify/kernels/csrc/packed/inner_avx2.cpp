// AVX2: the table lookup does the XOR as well. For a 4-bit piece a of the activation word, a 16-entry table holds
// popcount(a ^ i); the weights' 4-bit pieces are its indices. That is one shuffle and one addition per 128 weights, where
// XOR, split, two lookups and two additions would be eight operations per 256.
#include <immintrin.h>

#include "inner_common.h"
#include "inner_depthwise.h"
#include "inner_finish.h"

namespace bd {
namespace {

constexpr int kTile = 32;       // output channels per register of bytes
// Pixels of a block: what follows popcounts is set up once for all of them.
constexpr int kPixels = 15;
// Pixels at once: 6 counters, 4 indices, 2 tables and what is between fill the 16 registers; of a narrow tile, 5 counters and
// 5 tables.
constexpr int kAtOnce = 3, kNarrowAtOnce = 5;
constexpr int kTiles = 2;
// Bytes until a byte counter could overflow: one adds up to 8 (two planes: 24), in a narrow tile half of that. And until a
// 16-bit counter could.
template <int Planes, bool Narrow>
constexpr int kByteRoom = (Planes == 1 ? 31 : 10) * (Narrow ? 2 : 1);
template <int Planes>
constexpr int64_t kHalfRoom = Planes == 1 ? 8191 : 2730;

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

// tables[a] = popcount(a's low piece ^ i) for i in 0..15, then the same for its high piece.
struct Tables {
  alignas(64) uint8_t at[256][32];
  Tables() {
    for (int a = 0; a < 256; ++a)
      for (int i = 0; i < 16; ++i) {
        at[a][i] = (uint8_t)__builtin_popcount((unsigned)((a & 15) ^ i));
        at[a][16 + i] = (uint8_t)__builtin_popcount((unsigned)((a >> 4) ^ i));
      }
  }
};
const Tables kTables;

// pairs[a] of a 4-bit piece of either plane, the first's low: twice the popcount of the first's and the second's.
struct PairTables {
  alignas(64) uint8_t at[256][16];
  PairTables() {
    for (int a = 0; a < 256; ++a)
      for (int i = 0; i < 16; ++i)
        at[a][i] = (uint8_t)(2 * __builtin_popcount((unsigned)((a & 15) ^ i)) + __builtin_popcount((unsigned)((a >> 4) ^ i)));
  }
};
const PairTables kPairs;

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

// 16-bit sums of a register's bytes; of a narrow tile, of both of its halves.
template <bool Narrow>
inline __m256i halves(__m256i bytes, int which) {
  const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes));
  if (!Narrow && which == 0) return low;
  const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1));
  return Narrow ? _mm256_add_epi16(low, high) : high;
}

inline void store_counts(int32_t* to, __m256i half, bool add) {
  __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(half));
  __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(half, 1));
  if (add) {
    low = _mm256_add_epi32(low, _mm256_loadu_si256((const __m256i*)to));
    high = _mm256_add_epi32(high, _mm256_loadu_si256((const __m256i*)(to + 8)));
  }
  _mm256_storeu_si256((__m256i*)to, low);
  _mm256_storeu_si256((__m256i*)(to + 8), high);
}

// Popcounts of P pixels and V tiles of 32 channels, or of one of 16. Byte counters are added to 16-bit ones when they could
// overflow, and those to the counts; most layers need neither.
template <int Planes, int P, int V, bool Narrow>
void block(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w, int64_t tile_step,
           int32_t* counts, int64_t count_step) {
  constexpr int kHalves = Narrow ? 1 : 2;
  __m256i acc[P][V], half[P][V][kHalves];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[p][v] = _mm256_setzero_si256();
  bool halved = false, stored = false;
  int64_t held = 0, room = kByteRoom<Planes, Narrow>;
  for (int64_t s = 0; s < n; ++s) {
    const uint8_t* ap = (const uint8_t*)(a + segments[s].a);
    const uint8_t* wp = (const uint8_t*)(w + segments[s].w);
    for (int64_t j = 0; j < segments[s].bytes;) {
      if (room == 0) {
        const bool full = held + kByteRoom<Planes, Narrow> > kHalfRoom<Planes>;
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < V; ++v) {
            for (int i = 0; i < kHalves; ++i) {
              __m256i& to = half[p][v][i];
              if (full) store_counts(counts + p * count_step + v * kTile + 16 * i, to, stored);
              const __m256i more = halves<Narrow>(acc[p][v], i);
              to = halved && !full ? _mm256_add_epi16(to, more) : more;
            }
            acc[p][v] = _mm256_setzero_si256();
          }
        held = (full ? 0 : held) + kByteRoom<Planes, Narrow>;
        stored = stored || full;
        halved = true;
        room = kByteRoom<Planes, Narrow>;
      }
      const int64_t end = j + room < segments[s].bytes ? j + room : segments[s].bytes;
      room -= end - j;
      for (; j < end; ++j, wp += 2 * kTile) {
        __m256i lo[V], hi[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          lo[v] = _mm256_loadu_si256((const __m256i*)(wp + 4 * v * tile_step));
          if (!Narrow) hi[v] = _mm256_loadu_si256((const __m256i*)(wp + 4 * v * tile_step + kTile));
        }
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          // Little-endian: byte j of the words is 8 channels.
          const uint8_t* table = Planes == 1 ? kTables.at[ap[4 * p * a_step + j]] : kPairs.at[ap[4 * p * a_step + j]];
          const uint8_t* other = Planes == 1 ? table + 16 : kPairs.at[ap[4 * (second + p * a_step) + j]];
          if (Narrow) {
            const __m256i both = Planes == 1 ? _mm256_load_si256((const __m256i*)table)
                                             : _mm256_set_m128i(_mm_load_si128((const __m128i*)other), _mm_load_si128((const __m128i*)table));
            acc[p][0] = _mm256_add_epi8(acc[p][0], _mm256_shuffle_epi8(both, lo[0]));
            continue;
          }
          const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
          const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)other));
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            acc[p][v] = _mm256_add_epi8(_mm256_add_epi8(acc[p][v], _mm256_shuffle_epi8(low, lo[v])),
                                        _mm256_shuffle_epi8(high, hi[v]));
        }
      }
    }
  }
  // What the 16-bit counters may still take beside the byte counters: they were emptied in time.
  const bool more = halved && held + kByteRoom<Planes, Narrow> <= kHalfRoom<Planes>;
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < kHalves; ++i) {
        int32_t* to = counts + p * count_step + v * kTile + 16 * i;
        __m256i found = halves<Narrow>(acc[p][v], i);
        if (more) found = _mm256_add_epi16(found, half[p][v][i]);
        if (halved && !more) store_counts(to, half[p][v][i], stored);
        store_counts(to, found, stored || (halved && !more));
      }
}

// Any number of pixels, as many at once as the registers take.
template <int Planes, int V, bool Narrow>
void blocks(int pixels, const uint32_t* a, int64_t second, int64_t a_step, const Segment* s, int64_t n, const uint32_t* w,
            int64_t tile_step, int32_t* counts, int64_t count_step) {
  constexpr int kMost = Narrow ? kNarrowAtOnce : kAtOnce;
  for (; pixels >= kMost; pixels -= kMost, a += kMost * a_step, counts += kMost * count_step)
    block<Planes, kMost, V, Narrow>(a, second, a_step, s, n, w, tile_step, counts, count_step);
  switch (pixels) {
    case 0: return;
    case 1: return block<Planes, 1, V, Narrow>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    case 2: return block<Planes, 2, V, Narrow>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    case 3: return block<Planes, Narrow ? 3 : 1, V, Narrow>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    default: return block<Planes, Narrow ? 4 : 1, V, Narrow>(a, second, a_step, s, n, w, tile_step, counts, count_step);
  }
}

template <int Planes>
inline __attribute__((always_inline)) void gemm_of(const uint32_t* a, int64_t second, int64_t a_step, const Segment* s,
                                                   int64_t n, const uint32_t* w, int64_t tile_step, int pixels, int channels,
                                                   int32_t* counts, int64_t count_step) {
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

const Inner kInner = {kPixels, kTiles, kPixels, kTile, 2 * kTile, true, arrange, sum_pixels, pack_pixels, measure_pixels,
                      pack2_pixels, merge, gemm, gemm2, depthwise_counts, finish_block, average_pixels, fuse_pixel,
                      accumulate_row};

}  // namespace

const Inner* avx2_inner() { return &kInner; }

}  // namespace bd
