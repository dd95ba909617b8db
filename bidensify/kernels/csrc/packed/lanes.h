// 16 lanes of float, signed and unsigned integers on vectors of any width: one 64-byte vector, two of 32 or four of 16.
// GCC lowers a vector that is wider than the machine's element by element; pairs of native vectors keep it in registers.
#ifndef BIDENSIFY_LANES_H
#define BIDENSIFY_LANES_H

#include <stdint.h>
#include <string.h>

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
