// Depthwise population counts, bit-sliced across channels: written once on 16-lane vectors, as inner_common.h.
#ifndef BIDENSIFY_INNER_DEPTHWISE_H
#define BIDENSIFY_INNER_DEPTHWISE_H

#include <stdint.h>

#include "kernels.h"
#include "lanes.h"

namespace bd {
namespace {

inline vu load_words(const uint32_t* p) { return Memory<vu>::load(p); }

// Sum and carry of three bits per position; instruction sets with a three-input operation have their own.
#if !defined(BD_OWN_ADDER)
inline vu majority(vu a, vu b, vu c) { return (a & b) | (c & (a ^ b)); }
inline vu parity(vu a, vu b, vu c) { return a ^ b ^ c; }
inline vu differ(vu a, vu b, vu valid) { return (a ^ b) & valid; }
#endif

// Counters of 16 pixels x 32 channels from their bit planes: counts[pixel * 32 + channel], defined by each instruction set.
inline void counts_from_planes(const uint32_t (*planes)[kLanes], int bits, int32_t* counts);

// Any number of planes: adds 2^bit where the channel's bit is set.
inline void counts_from_many_planes(const uint32_t (*planes)[kLanes], int bits, int32_t* counts) {
  static const int32_t kBit[kLanes] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const vi mask = Memory<vi>::load(kBit);
  for (int half = 0; half < 2; ++half)
    for (int p = 0; p < kLanes; ++p) {
      vi sum = splat((int32_t)0);
      for (int bit = 0; bit < bits; ++bit) {
        const vi word = splat((int32_t)(planes[bit][p] >> (16 * half) & 0xffffu));
        sum += equal(word & mask, mask) & splat((int32_t)1 << bit);
      }
      Memory<vi>::store(counts + p * 2 * kLanes + half * kLanes, sum);
    }
}

// Seven taps give three bits per position (four full adders), which are added to the running counters: bit-sliced
// counting as in the carry-save population count of Harley and Seal.
template <bool Masked, int Bits>
void depthwise_planes(const uint32_t* const* taps, const uint32_t* const* valid, const uint32_t* weights, int n, int used,
                      int32_t* counts) {
  vu sum[Bits];
  for (int i = 0; i < Bits; ++i) sum[i] = splat(0u);
  for (int i = 0; i < n; i += 7) {
    vu t[7];
    const int m = n - i < 7 ? n - i : 7;
#pragma GCC unroll 7
    for (int j = 0; j < 7; ++j) {
      if (j < m) {
        const vu x = load_words(taps[i + j]), w = splat(weights[i + j]);
        t[j] = Masked ? differ(x, w, load_words(valid[i + j])) : x ^ w;
      } else {
        t[j] = splat(0u);
      }
    }
    const vu s0 = parity(t[0], t[1], t[2]), c0 = majority(t[0], t[1], t[2]);
    const vu s1 = parity(t[3], t[4], t[5]), c1 = majority(t[3], t[4], t[5]);
    const vu one = parity(s0, s1, t[6]), c2 = majority(s0, s1, t[6]);
    const vu two = parity(c0, c1, c2), four = majority(c0, c1, c2);
    vu carry = sum[0] & one;
    sum[0] ^= one;
    const vu next = majority(sum[1], two, carry);
    sum[1] = parity(sum[1], two, carry);
    carry = majority(sum[2], four, next);
    sum[2] = parity(sum[2], four, next);
#pragma GCC unroll 32
    for (int bit = 3; bit < Bits; ++bit) {
      const vu up = sum[bit] & carry;
      sum[bit] ^= carry;
      carry = up;
    }
  }
  uint32_t planes[Bits][kLanes];
  for (int bit = 0; bit < Bits; ++bit) Memory<vu>::store(planes[bit], sum[bit]);
  if (Bits <= 8) {
    counts_from_planes(planes, used, counts);
  } else {
    counts_from_many_planes(planes, used, counts);
  }
}

template <bool Masked>
void depthwise_sized(const uint32_t* const* taps, const uint32_t* const* valid, const uint32_t* weights, int n,
                     int32_t* counts) {
  int bits = 1;
  while (n >> bits) ++bits;
  if (bits <= 4) return depthwise_planes<Masked, 4>(taps, valid, weights, n, bits, counts);
  if (bits <= 6) return depthwise_planes<Masked, 6>(taps, valid, weights, n, bits, counts);
  if (bits <= 8) return depthwise_planes<Masked, 8>(taps, valid, weights, n, bits, counts);
  return depthwise_planes<Masked, 26>(taps, valid, weights, n, bits, counts);
}

void depthwise_counts(const uint32_t* const* taps, const uint32_t* const* valid, const uint32_t* weights, int n, bool masked,
                      int32_t* counts) {
  if (masked) return depthwise_sized<true>(taps, valid, weights, n, counts);
  return depthwise_sized<false>(taps, valid, weights, n, counts);
}

}  // namespace
}  // namespace bd
#endif
