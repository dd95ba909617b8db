// The passes over the input, written once on 16-lane vectors: sums, and bits with their distances. Each instruction set
// compiles its own copy (everything is in an unnamed namespace, so that no copy leaks into another object file). Sums run
// in the same order everywhere: a layer gives the same bits on every instruction set.
#ifndef BIDENSIFY_INNER_COMMON_H
#define BIDENSIFY_INNER_COMMON_H

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "lanes.h"

namespace bd {
namespace {

inline vf load_f32(const float* p) { return Memory<vf>::load(p); }

// Lanes of two vectors of which one is 0 there; a sum would lose the sign of -0.
inline vf either(vf a, vf b) { return as_float(as_uint(a) | as_uint(b)); }

template <int D>
struct Type;
template <>
struct Type<BD_FLOAT32> {
  typedef float T;
  static vf load(const float* p) { return load_f32(p); }
  static vf load(const float* p, int n) {
    return n >= kLanes ? load_f32(p) : Part<vf, float>::load(p, n);
  }
  // Lanes 0..m-1 of what begins at p, then lanes m..n-1 of what begins at q.
  static vf load_two(const float* p, const float* q, int m, int n) {
    return either(Part<vf, float>::load(p, m), Part<vf, float>::between(q, m, n));
  }
  static void store(float* p, vf v, int n) {
    if (n >= kLanes) {
      Memory<vf>::store(p, v);
    } else {
      Part<vf, float>::store(p, v, n);
    }
  }
};
template <>
struct Type<BD_BFLOAT16> {
  typedef uint16_t T;
  static vf load(const uint16_t* p) { return widen(Memory<vh>::load(p)); }
  static vf load(const uint16_t* p, int n) {
    return n >= kLanes ? load(p) : widen(Part<vh, uint16_t>::load(p, n));
  }
  static vf load_two(const uint16_t* p, const uint16_t* q, int m, int n) {
    return either(widen(Part<vh, uint16_t>::load(p, m)), widen(Part<vh, uint16_t>::between(q, m, n)));
  }
  static void store(uint16_t* p, vf v, int n) {
    const vh h = narrow(v);
    if (n >= kLanes) {
      Memory<vh>::store(p, h);
    } else {
      Part<vh, uint16_t>::store(p, h, n);
    }
  }
};

// Asks for what lies this far behind a piece of x: pixels that are read side by side are no stream that a processor foresees.
constexpr int64_t kAhead = 8 << 10;
template <int Bytes>
inline void look_ahead(const void* p) {
  for (int at = 0; at < Bytes; at += 64) __builtin_prefetch((const char*)p + kAhead + at);
}

inline int lanes_at(int64_t c, int64_t at) { return c - at < kLanes ? (int)(c - at) : kLanes; }

// Rows values added as the quad (v0 + v1) + (v2 + v3), a missing one counting as 0.
template <int Rows>
inline vf quad(const vf* v) {
  if (Rows == 1) return v[0];
  if (Rows == 2) return v[0] + v[1];
  if (Rows == 3) return (v[0] + v[1]) + v[2];
  return (v[0] + v[1]) + (v[2] + v[3]);
}

template <int D, int Rows>
inline void sum_quad(const typename Type<D>::T* x, int64_t c, float* acc) {
  typedef Type<D> Ty;
  vf v[Rows];
  int64_t i = 0;
  for (; i + kLanes <= c; i += kLanes) {
    look_ahead<Rows * kLanes * (int)sizeof(*x)>(x + Rows * i);
    for (int r = 0; r < Rows; ++r) v[r] = Ty::load(x + r * c + i);
    Memory<vf>::store(acc + i, load_f32(acc + i) + quad<Rows>(v));
  }
  if (i < c) {
    const int n = lanes_at(c, i);
    for (int r = 0; r < Rows; ++r) v[r] = Ty::load(x + r * c + i, n);
    Type<BD_FLOAT32>::store(acc + i, Type<BD_FLOAT32>::load(acc + i, n) + quad<Rows>(v), n);
  }
}

template <int D>
void sum_typed(const void* data, int64_t pixels, int64_t c, float* acc) {
  const typename Type<D>::T* x = (const typename Type<D>::T*)data;
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) sum_quad<D, 4>(x + p * c, c, acc);
  switch (pixels - p) {
    case 1: return sum_quad<D, 1>(x + p * c, c, acc);
    case 2: return sum_quad<D, 2>(x + p * c, c, acc);
    case 3: return sum_quad<D, 3>(x + p * c, c, acc);
    default: return;
  }
}

void sum_pixels(const void* x, int dtype, int64_t pixels, int64_t c, float* acc) {
  if (dtype == BD_FLOAT32) {
    sum_typed<BD_FLOAT32>(x, pixels, c, acc);
  } else {
    sum_typed<BD_BFLOAT16>(x, pixels, c, acc);
  }
}

// Bits of (a >= b), defined by each instruction set.
inline uint32_t at_least(vf a, vf b);

// Words of Rows pixels, and the quads of their distances.
template <int D, bool Distance, int Rows>
inline void pack_quad(const typename Type<D>::T* x, int64_t x_step, int64_t c, const float* beta, uint32_t* const* out,
                      int64_t word_step, float* acc) {
  typedef Type<D> Ty;
  int64_t i = 0, word = 0;
  for (; i + 2 * kLanes <= c; i += 2 * kLanes, word += word_step) {
    const vf b0 = load_f32(beta + i), b1 = load_f32(beta + i + kLanes);
    vf d0[Rows], d1[Rows];
    look_ahead<2 * Rows * kLanes * (int)sizeof(*x)>(x + Rows * i);
    for (int r = 0; r < Rows; ++r) {
      const vf v0 = Ty::load(x + r * x_step + i), v1 = Ty::load(x + r * x_step + i + kLanes);
      out[r][word] = at_least(v0, b0) | (at_least(v1, b1) << 16);
      if (Distance) {
        d0[r] = absolute(v0 - b0);
        d1[r] = absolute(v1 - b1);
      }
    }
    if (Distance) {
      Memory<vf>::store(acc + i, load_f32(acc + i) + quad<Rows>(d0));
      Memory<vf>::store(acc + i + kLanes, load_f32(acc + i + kLanes) + quad<Rows>(d1));
    }
  }
  if (i >= c) return;
  for (int r = 0; r < Rows; ++r) out[r][word] = 0;
  for (int half = 0; half < 2 && i < c; ++half, i += kLanes) {
    const int n = lanes_at(c, i);
    const uint32_t used = n == kLanes ? 0xffffu : (1u << n) - 1u;
    const vf b = Type<BD_FLOAT32>::load(beta + i, n);
    vf d[Rows];
    for (int r = 0; r < Rows; ++r) {
      const vf v = Ty::load(x + r * x_step + i, n);
      out[r][word] |= (at_least(v, b) & used) << (16 * half);
      if (Distance) d[r] = absolute(v - b);
    }
    if (Distance) Memory<vf>::store(acc + i, load_f32(acc + i) + quad<Rows>(d));
  }
}

template <int D, bool Distance>
void pack_typed(const void* data, int64_t pixels, int64_t x_step, int64_t c, const float* beta, uint32_t* out,
                const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step, float* acc, double* lanes) {
  const typename Type<D>::T* x = (const typename Type<D>::T*)data;
  if (Distance) memset(acc, 0, sizeof(float) * (size_t)(c + kLanes));
  for (int64_t p = 0; p < pixels; p += 4) {
    uint32_t* to[4];
    const int rows = pixels - p < 4 ? (int)(pixels - p) : 4;
    for (int r = 0; r < rows; ++r) to[r] = out + (pixel_offset ? pixel_offset[p + r] : (p + r) * pixel_step);
    const typename Type<D>::T* from = x + p * x_step;
    switch (rows) {
      case 1: pack_quad<D, Distance, 1>(from, x_step, c, beta, to, word_step, acc); break;
      case 2: pack_quad<D, Distance, 2>(from, x_step, c, beta, to, word_step, acc); break;
      case 3: pack_quad<D, Distance, 3>(from, x_step, c, beta, to, word_step, acc); break;
      default: pack_quad<D, Distance, 4>(from, x_step, c, beta, to, word_step, acc);
    }
  }
  if (Distance)
    for (int64_t i = 0; i < c; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += (double)acc[i + lane];
}

// The distances of pack_typed alone.
template <int D, int Rows>
inline void measure_quad(const typename Type<D>::T* x, int64_t c, const float* beta, float* acc) {
  typedef Type<D> Ty;
  vf d[Rows];
  for (int64_t i = 0; i < c; i += kLanes) {
    const int n = lanes_at(c, i);
    const vf b = Type<BD_FLOAT32>::load(beta + i, n);
    look_ahead<Rows * kLanes * (int)sizeof(*x)>(x + Rows * i);
    for (int r = 0; r < Rows; ++r) d[r] = absolute(Ty::load(x + r * c + i, n) - b);
    Memory<vf>::store(acc + i, load_f32(acc + i) + quad<Rows>(d));
  }
}

template <int D>
void measure_typed(const void* data, int64_t pixels, int64_t c, const float* beta, float* acc, double* lanes) {
  const typename Type<D>::T* x = (const typename Type<D>::T*)data;
  memset(acc, 0, sizeof(float) * (size_t)(c + kLanes));
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) measure_quad<D, 4>(x + p * c, c, beta, acc);
  switch (pixels - p) {
    case 1: measure_quad<D, 1>(x + p * c, c, beta, acc); break;
    case 2: measure_quad<D, 2>(x + p * c, c, beta, acc); break;
    case 3: measure_quad<D, 3>(x + p * c, c, beta, acc); break;
    default: break;
  }
  for (int64_t i = 0; i < c; ++i) lanes[i % kLanes] += (double)acc[i];
}

void measure_pixels(const void* x, int dtype, int64_t pixels, int64_t c, const float* beta, float* acc, double* lanes) {
  if (dtype == BD_FLOAT32) {
    measure_typed<BD_FLOAT32>(x, pixels, c, beta, acc, lanes);
  } else {
    measure_typed<BD_BFLOAT16>(x, pixels, c, beta, acc, lanes);
  }
}

template <int D>
void pack2_typed(const void* data, int64_t pixels, int64_t x_step, int64_t c, const float* beta, float step, uint32_t* out,
                 int64_t second, const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step) {
  typedef Type<D> Ty;
  const typename Ty::T* x = (const typename Ty::T*)data;
  const vf shift = splat(step);
  for (int64_t p = 0; p < pixels; p += 4) {
    uint32_t* to[4];
    const int rows = pixels - p < 4 ? (int)(pixels - p) : 4;
    for (int r = 0; r < rows; ++r) to[r] = out + (pixel_offset ? pixel_offset[p + r] : (p + r) * pixel_step);
    const typename Ty::T* from = x + p * x_step;
    int64_t word = 0;
    for (int64_t i = 0; i < c; i += 2 * kLanes, word += word_step) {
      look_ahead<8 * kLanes * (int)sizeof(*x)>(from + 4 * i);
      const int n0 = lanes_at(c, i), n1 = i + kLanes < c ? lanes_at(c, i + kLanes) : 0;
      const uint32_t used = n0 + n1 == 32 ? 0xffffffffu : (1u << (n0 + n1)) - 1u;
      const vf b0 = Type<BD_FLOAT32>::load(beta + i, n0), b1 = Type<BD_FLOAT32>::load(beta + i + (n1 ? kLanes : 0), n1);
      const vf up0 = b0 + shift, up1 = b1 + shift, down0 = b0 - shift, down1 = b1 - shift;
      for (int r = 0; r < rows; ++r) {
        const typename Ty::T* at = from + r * x_step + i;
        const vf v0 = Ty::load(at, n0), v1 = Ty::load(at + (n1 ? kLanes : 0), n1);
        to[r][word] = (at_least(v0, b0) | at_least(v1, b1) << 16) & used;
        to[r][word + second] = (at_least(v0, select_at_least(v0, b0, up0, down0)) |
                                at_least(v1, select_at_least(v1, b1, up1, down1)) << 16) & used;
      }
    }
  }
}

void pack2_pixels(const void* x, int dtype, int64_t pixels, int64_t x_step, int64_t c, const float* beta, float step,
                  uint32_t* out, int64_t second, const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step) {
  const auto run = dtype == BD_FLOAT32 ? pack2_typed<BD_FLOAT32> : pack2_typed<BD_BFLOAT16>;
  run(x, pixels, x_step, c, beta, step, out, second, pixel_offset, pixel_step, word_step);
}

void pack_pixels(const void* x, int dtype, int64_t pixels, int64_t x_step, int64_t c, const float* beta, uint32_t* out,
                 const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step, float* acc, double* lanes) {
  const auto run = dtype == BD_FLOAT32 ? (acc ? pack_typed<BD_FLOAT32, true> : pack_typed<BD_FLOAT32, false>)
                                       : (acc ? pack_typed<BD_BFLOAT16, true> : pack_typed<BD_BFLOAT16, false>);
  run(x, pixels, x_step, c, beta, out, pixel_offset, pixel_step, word_step, acc, lanes);
}

}  // namespace
}  // namespace bd
#endif
