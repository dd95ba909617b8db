// Popcounts of blocks on AVX2. The table lookup does the XOR as well. For a 4-bit piece a of the activation word, a 16-entry table
// holds popcount(a ^ i); the weights' 4-bit pieces are its indices. That is one shuffle and one addition per 128 weights, where
// XOR, split, two lookups and two additions would be eight operations per 256.
#ifndef BIDENSIFY_INNER_AVX2_BLOCKS_H
#define BIDENSIFY_INNER_AVX2_BLOCKS_H

#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

namespace bd {
namespace {

constexpr int kTile = 32;       // output channels per register of bytes
// Pixels of a block: what follows popcounts is set up once for all of them.
constexpr int kPixels = 15;
// Pixels at once: 6 counters, 4 indices, 2 tables and what is between fill the 16 registers; of a narrow tile, 5 counters and
// 5 tables.
constexpr int kAtOnce = 3, kNarrowAtOnce = 5;
constexpr int kTiles = 2;
// Words until a byte counter could overflow (7 * 32 <= 255; two planes: 2 * 96), and until a 16-bit counter could.
template <int Planes>
constexpr int kByteWords = Planes == 1 ? 7 : 2;
template <int Planes>
constexpr int kHalfWords = Planes == 1 ? 2016 : 682;
// The same in bytes: one adds up to 8 (two planes: 24), in a narrow tile half of that.
template <int Planes, bool Narrow>
constexpr int kByteRoom = (Planes == 1 ? 31 : 10) * (Narrow ? 2 : 1);
template <int Planes>
constexpr int64_t kHalfRoom = Planes == 1 ? 8191 : 2730;

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

inline void widen_to(uint16_t* half, __m256i bytes) {
  __m256i* h = (__m256i*)half;
  _mm256_store_si256(h, _mm256_add_epi16(_mm256_load_si256(h), _mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes))));
  _mm256_store_si256(h + 1, _mm256_add_epi16(_mm256_load_si256(h + 1), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1))));
}

template <bool Add>
inline void widen_to(int32_t* counts, uint16_t* half) {
  for (int i = 0; i < kTile; i += 8) {
    __m256i* to = (__m256i*)(counts + i);
    const __m256i more = _mm256_cvtepu16_epi32(_mm_load_si128((const __m128i*)(half + i)));
    _mm256_storeu_si256(to, Add ? _mm256_add_epi32(_mm256_loadu_si256(to), more) : more);
    _mm_store_si128((__m128i*)(half + i), _mm_setzero_si128());
  }
}

// Popcounts of up to three pixels over many words.
template <int Planes, int P, int V>
void few(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w, int64_t tile_step,
           int32_t* counts, int64_t count_step) {
  alignas(32) uint16_t half[P][V][kTile];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < kTile; i += 16) _mm256_store_si256((__m256i*)(half[p][v] + i), _mm256_setzero_si256());
  bool folded = false;
  int64_t words = 0;
  for (int64_t s = 0; s < n; ++s) {
    const uint8_t* ap = (const uint8_t*)(a + segments[s].a);
    const uint8_t* wp = (const uint8_t*)(w + segments[s].w);
    for (int64_t t = 0; t < segments[s].n;) {
      const int64_t end = t + kByteWords<Planes> < segments[s].n ? t + kByteWords<Planes> : segments[s].n;
      words += end - t;
      __m256i acc[P][V];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[p][v] = _mm256_setzero_si256();
      for (int64_t j = 4 * t; j < 4 * end; ++j, wp += 2 * kTile) {
        __m256i lo[V], hi[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          lo[v] = _mm256_loadu_si256((const __m256i*)(wp + 4 * v * tile_step));
          hi[v] = _mm256_loadu_si256((const __m256i*)(wp + 4 * v * tile_step + kTile));
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          // Little-endian: byte j of the words is 8 channels.
          const uint8_t* table = Planes == 1 ? kTables.at[ap[4 * p * a_step + j]] : kPairs.at[ap[4 * p * a_step + j]];
          const uint8_t* other = Planes == 1 ? table + 16 : kPairs.at[ap[4 * (second + p * a_step) + j]];
          const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
          const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)other));
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            acc[p][v] = _mm256_add_epi8(_mm256_add_epi8(acc[p][v], _mm256_shuffle_epi8(low, lo[v])),
                                        _mm256_shuffle_epi8(high, hi[v]));
        }
      }
      t = end;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) widen_to(half[p][v], acc[p][v]);
      if (words > kHalfWords<Planes> - kByteWords<Planes>) {
        words = 0;
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < V; ++v) {
            int32_t* to = counts + p * count_step + v * kTile;
            if (folded) {
              widen_to<true>(to, half[p][v]);
            } else {
              widen_to<false>(to, half[p][v]);
            }
          }
        folded = true;
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) {
      int32_t* to = counts + p * count_step + v * kTile;
      if (folded) {
        widen_to<true>(to, half[p][v]);
      } else {
        widen_to<false>(to, half[p][v]);
      }
    }
}

template <int Planes, int V>
inline __attribute__((always_inline)) void few_blocks(int pixels, const uint32_t* a, int64_t second, int64_t a_step,
                                                      const Segment* s, int64_t n, const uint32_t* w, int64_t tile_step,
                                                  int32_t* counts, int64_t count_step) {
  switch (pixels) {
    case 1: return few<Planes, 1, V>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    case 2: return few<Planes, 2, V>(a, second, a_step, s, n, w, tile_step, counts, count_step);
    default: return few<Planes, 3, V>(a, second, a_step, s, n, w, tile_step, counts, count_step);
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
// overflow, and those to the counts.
template <int Planes, int P, int V, bool Narrow>
void block(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w, int64_t tile_step,
           int32_t* counts, int64_t count_step) {
  constexpr int kHalves = Narrow ? 1 : 2;
  __m256i acc[P][V];
  alignas(32) uint16_t half[P * V * kHalves][16] = {};
  const auto kept = [&half](int p, int v, int i) { return (__m256i*)half[(p * V + v) * kHalves + i]; };
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[p][v] = _mm256_setzero_si256();
  bool stored = false;
  int64_t held = 0, room = kByteRoom<Planes, Narrow>;
  for (int64_t s = 0; s < n; ++s) {
    const uint8_t* ap = (const uint8_t*)(a + segments[s].a);
    const uint8_t* wp = (const uint8_t*)(w + segments[s].w);
    for (int64_t j = 0; j < segments[s].bytes;) {
      if (room == 0) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            for (int i = 0; i < kHalves; ++i)
              _mm256_store_si256(kept(p, v, i), _mm256_add_epi16(_mm256_load_si256(kept(p, v, i)), halves<Narrow>(acc[p][v], i)));
            acc[p][v] = _mm256_setzero_si256();
          }
        room = kByteRoom<Planes, Narrow>;
        held += room;
        // They must take the byte counters once more.
        if (held + room > kHalfRoom<Planes>) {
          for (int p = 0; p < P; ++p)
            for (int v = 0; v < V; ++v)
              for (int i = 0; i < kHalves; ++i) {
                store_counts(counts + p * count_step + v * kTile + 16 * i, _mm256_load_si256(kept(p, v, i)), stored);
                _mm256_store_si256(kept(p, v, i), _mm256_setzero_si256());
              }
          stored = true;
          held = 0;
        }
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
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < kHalves; ++i) {
        __m256i found = halves<Narrow>(acc[p][v], i);
        if (held != 0) found = _mm256_add_epi16(found, _mm256_load_si256(kept(p, v, i)));
        store_counts(counts + p * count_step + v * kTile + 16 * i, found, stored);
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

}  // namespace
}  // namespace bd
#endif
