// 16 lanes of float, signed and unsigned integers on vectors of any width: one 64-byte vector, two of 32 or four of 16.
// GCC lowers a vector that is wider than the machine's element by element; pairs of native vectors keep it in registers.
#ifndef BIDENSIFY_LANES_H
#define BIDENSIFY_LANES_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bd {
namespace {

template <int Bytes>
struct Native {
  typedef float f __attribute__((vector_size(Bytes)));
  typedef int32_t i __attribute__((vector_size(Bytes)));
  typedef uint32_t u __attribute__((vector_size(Bytes)));
  typedef uint16_t h __attribute__((vector_size(Bytes / 2)));
};

template <class V>
struct Pair {
  V lo, hi;
};

#if defined(__AVX512F__)
typedef Native<64>::f vf;
typedef Native<64>::i vi;
typedef Native<64>::u vu;
typedef Native<64>::h vh;
constexpr int kNative = 64;
#elif defined(__AVX2__)
typedef Pair<Native<32>::f> vf;
typedef Pair<Native<32>::i> vi;
typedef Pair<Native<32>::u> vu;
typedef Pair<Native<32>::h> vh;
constexpr int kNative = 32;
#else
typedef Pair<Pair<Native<16>::f>> vf;
typedef Pair<Pair<Native<16>::i>> vi;
typedef Pair<Pair<Native<16>::u>> vu;
typedef Pair<Pair<Native<16>::h>> vh;
constexpr int kNative = 16;
#endif
typedef Native<kNative> N;

#define BD_BINARY(op)                                                            \
  template <class V>                                                             \
  inline __attribute__((always_inline)) Pair<V> operator op(Pair<V> a, Pair<V> b) { \
    return {a.lo op b.lo, a.hi op b.hi};                                         \
  }                                                                              \
  template <class V>                                                             \
  inline __attribute__((always_inline)) Pair<V>& operator op##=(Pair<V>& a, Pair<V> b) { \
    return a = a op b;                                                           \
  }
BD_BINARY(+)
BD_BINARY(-)
BD_BINARY(*)
BD_BINARY(/)
BD_BINARY(&)
BD_BINARY(|)
BD_BINARY(^)
#undef BD_BINARY

template <class V>
inline Pair<V> operator~(Pair<V> a) { return {~a.lo, ~a.hi}; }
template <class V>
inline Pair<V> operator<<(Pair<V> a, int n) { return {a.lo << n, a.hi << n}; }
template <class V>
inline Pair<V> operator>>(Pair<V> a, int n) { return {a.lo >> n, a.hi >> n}; }

// One value in every lane.
template <class V>
struct Splat {
  template <class E>
  static inline __attribute__((always_inline)) V of(E e) { return V{} + e; }
};
template <class V>
struct Splat<Pair<V>> {
  template <class E>
  static inline __attribute__((always_inline)) Pair<V> of(E e) { return {Splat<V>::of(e), Splat<V>::of(e)}; }
};
inline vf splat(float v) { return Splat<vf>::of(v); }
inline vi splat(int32_t v) { return Splat<vi>::of(v); }
inline vu splat(uint32_t v) { return Splat<vu>::of(v); }

template <class V>
struct Memory {
  static inline __attribute__((always_inline)) V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static inline __attribute__((always_inline)) void store(void* p, V v) { memcpy(p, &v, sizeof v); }
};
template <class V>
struct Memory<Pair<V>> {
  static inline __attribute__((always_inline)) Pair<V> load(const void* p) {
    return {Memory<V>::load(p), Memory<V>::load((const char*)p + sizeof(V))};
  }
  static inline __attribute__((always_inline)) void store(void* p, Pair<V> v) {
    Memory<V>::store(p, v.lo);
    Memory<V>::store((char*)p + sizeof(V), v.hi);
  }
};

// Some of a vector's lanes: the first n (n is less than a vector has, and may be 0), or lanes m to n-1 of what begins at p (m <= n,
// n at most what a vector has). Others are 0, or left as they are. Channels that no vector divides take these for every pixel; a
// copy of n values through memory would wait for itself there.
template <class V, class E>
struct Part {
  static constexpr int kHere = (int)(sizeof(V) / sizeof(E));
  static inline V load(const E* p, int n) {
    V v = {};
#pragma GCC unroll 8
    for (int i = 0; i < kHere; ++i)
      if (i < n) v[i] = p[i];
    return v;
  }
  static inline V between(const E* p, int m, int n) {
    V v = {};
#pragma GCC unroll 8
    for (int i = 0; i < kHere; ++i)
      if (i >= m && i < n) v[i] = p[i];
    return v;
  }
  static inline void store(E* p, V v, int n) {
#pragma GCC unroll 8
    for (int i = 0; i < kHere; ++i)
      if (i < n) p[i] = v[i];
  }
};
template <class V, class E>
struct Part<Pair<V>, E> {
  static constexpr int kHalf = (int)(sizeof(V) / sizeof(E));
  static inline Pair<V> load(const E* p, int n) {
    if (n < kHalf) return {Part<V, E>::load(p, n), V{}};
    return {Memory<V>::load(p), Part<V, E>::load(p + kHalf, n - kHalf)};
  }
  static inline Pair<V> between(const E* p, int m, int n) {
    return {Part<V, E>::between(p, m, n < kHalf ? n : kHalf), Part<V, E>::between(p + kHalf, m > kHalf ? m - kHalf : 0, n - kHalf)};
  }
  static inline void store(E* p, Pair<V> v, int n) {
    if (n < kHalf) return Part<V, E>::store(p, v.lo, n);
    Memory<V>::store(p, v.lo);
    Part<V, E>::store(p + kHalf, v.hi, n - kHalf);
  }
};
#if defined(__AVX512F__)
template <>
struct Part<vf, float> {
  static inline vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
  static inline vf between(const float* p, int m, int n) {
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - (1u << m)), p);
  }
  static inline void store(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
};
template <>
struct Part<vh, uint16_t> {
  static inline vh load(const uint16_t* p, int n) { return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p); }
  static inline vh between(const uint16_t* p, int m, int n) {
    return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - (1u << m)), p);
  }
  static inline void store(uint16_t* p, vh v, int n) { _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v); }
};
#elif defined(__AVX2__)
// Masked loads are fast, masked stores on AMD's processors are not: those are made of pieces.
alignas(32) constexpr int32_t kMasks[24] = {-1, -1, -1, -1, -1, -1, -1, -1};
inline __m256i mask_of(int n) { return _mm256_loadu_si256((const __m256i*)(kMasks + 8 - (n < 0 ? 0 : n))); }
template <>
struct Part<Native<32>::f, float> {
  typedef Native<32>::f V;
  static inline V load(const float* p, int n) {
    return (V)_mm256_maskload_ps(p, mask_of(n));
  }
  static inline V between(const float* p, int m, int n) {
    return (V)_mm256_maskload_ps(p, _mm256_andnot_si256(mask_of(m < 8 ? m : 8), mask_of(n)));
  }
  static inline void store(float* p, V v, int n) {
    __m128 four = _mm256_castps256_ps128((__m256)v);
    if (n & 4) {
      _mm_storeu_ps(p, four);
      four = _mm256_extractf128_ps((__m256)v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi((__m64*)p, four);
      four = _mm_movehl_ps(four, four);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, four);
  }
};
template <>
struct Part<Native<32>::h, uint16_t> {
  typedef Native<32>::h V;
  // Up to four values in the low bits.
  static inline int64_t few(const uint16_t* p, int n) {
    uint32_t two = 0;
    uint64_t found = 0;
    if (n & 2) memcpy(&two, p, 4);
    if (n & 1) found = (uint64_t)p[n - 1] << (8 * (n & 2) * 2);
    return (int64_t)(found | two);
  }
  static inline void put(uint16_t* p, int64_t values, int n) {
    if (n & 2) {
      memcpy(p, &values, 4);
      values = (int64_t)((uint64_t)values >> 32);
      p += 2;
    }
    if (n & 1) *p = (uint16_t)values;
  }
  static inline V load(const uint16_t* p, int n) {
    if (n < 4) return (V)_mm_set_epi64x(0, few(p, n));
    int64_t four;
    memcpy(&four, p, 8);
    return (V)_mm_set_epi64x(few(p + 4, n - 4), four);
  }
  static inline V between(const uint16_t* p, int m, int n) {
    V v = {};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      if (i >= m && i < n) v[i] = p[i];
    return v;
  }
  static inline void store(uint16_t* p, V v, int n) {
    const __m128i all = (__m128i)v;
    if (n < 4) return put(p, _mm_cvtsi128_si64(all), n);
    _mm_storel_epi64((__m128i*)p, all);
    put(p + 4, _mm_extract_epi64(all, 1), n - 4);
  }
};
#endif

inline N::f to_float(N::i v) { return __builtin_convertvector(v, N::f); }
inline N::u from_half(N::h v) { return __builtin_convertvector(v, N::u); }
inline N::h to_half(N::u v) { return __builtin_convertvector(v, N::h); }
inline N::u as_uint(N::f v) { return (N::u)v; }
inline N::f as_float(N::u v) { return (N::f)v; }
inline N::f choose_positive(N::f v, N::f otherwise, N::f chosen) { return v > 0 ? chosen : otherwise; }
inline N::f bounded(N::f v, N::f low, N::f high) {
  v = v > high ? high : v;
  return v < low ? low : v;
}
inline N::f select_at_least(N::f a, N::f b, N::f chosen, N::f otherwise) { return a >= b ? chosen : otherwise; }
inline N::u greater(N::u a, N::u b) { return (N::u)(a > b); }
inline N::i equal(N::i a, N::i b) { return (N::i)(a == b); }

template <class V>
inline auto to_float(Pair<V> v) -> Pair<decltype(to_float(v.lo))> { return {to_float(v.lo), to_float(v.hi)}; }
template <class V>
inline auto from_half(Pair<V> v) -> Pair<decltype(from_half(v.lo))> { return {from_half(v.lo), from_half(v.hi)}; }
template <class V>
inline auto to_half(Pair<V> v) -> Pair<decltype(to_half(v.lo))> { return {to_half(v.lo), to_half(v.hi)}; }
template <class V>
inline auto as_uint(Pair<V> v) -> Pair<decltype(as_uint(v.lo))> { return {as_uint(v.lo), as_uint(v.hi)}; }
template <class V>
inline auto as_float(Pair<V> v) -> Pair<decltype(as_float(v.lo))> { return {as_float(v.lo), as_float(v.hi)}; }
template <class V>
inline Pair<V> choose_positive(Pair<V> v, Pair<V> o, Pair<V> c) {
  return {choose_positive(v.lo, o.lo, c.lo), choose_positive(v.hi, o.hi, c.hi)};
}
template <class V>
inline Pair<V> bounded(Pair<V> v, Pair<V> low, Pair<V> high) {
  return {bounded(v.lo, low.lo, high.lo), bounded(v.hi, low.hi, high.hi)};
}
template <class V>
inline Pair<V> select_at_least(Pair<V> a, Pair<V> b, Pair<V> c, Pair<V> o) {
  return {select_at_least(a.lo, b.lo, c.lo, o.lo), select_at_least(a.hi, b.hi, c.hi, o.hi)};
}
template <class V>
inline Pair<V> greater(Pair<V> a, Pair<V> b) { return {greater(a.lo, b.lo), greater(a.hi, b.hi)}; }
template <class V>
inline Pair<V> equal(Pair<V> a, Pair<V> b) { return {equal(a.lo, b.lo), equal(a.hi, b.hi)}; }

inline vf widen(vh h) { return as_float(from_half(h) << 16); }

// Round to nearest even, as torch does; a NaN stays one.
inline vh narrow(vf v) {
  const vu u = as_uint(v);
  const vu rounded = (u + splat(0x7fffu) + ((u >> 16) & splat(1u))) >> 16;
  const vu nan = (u >> 16) | splat(0x40u);
  const vu is_nan = greater(u & splat(0x7fffffffu), splat(0x7f800000u));
  return to_half((nan & is_nan) | (rounded & ~is_nan));
}

inline vf absolute(vf v) { return as_float(as_uint(v) & splat(0x7fffffffu)); }

}  // namespace
}  // namespace bd
#endif
