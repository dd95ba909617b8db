// Float passes and the bit-sliced depthwise count, written once on 16-lane vectors. Each instruction set compiles its own
// copy (everything is in an unnamed namespace, so that no copy leaks into another's object file). Sums run in the same
// order everywhere: a layer gives the same bits on every instruction set.
#ifndef BIDENSIFY_INNER_COMMON_H
#define BIDENSIFY_INNER_COMMON_H

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "lanes.h"

namespace bd {
namespace {

inline vf load_f32(const float* p) { return Memory<vf>::load(p); }

template <int D>
struct Type;
template <>
struct Type<BD_FLOAT32> {
  typedef float T;
  static vf load(const float* p) { return load_f32(p); }
  static vf load(const float* p, int n) {
    if (n >= kLanes) return load_f32(p);
    float t[kLanes] = {};
    memcpy(t, p, sizeof(float) * (size_t)n);
    return load_f32(t);
  }
  static void store(float* p, vf v, int n) {
    if (n >= kLanes) {
      Memory<vf>::store(p, v);
    } else {
      float t[kLanes];
      Memory<vf>::store(t, v);
      memcpy(p, t, sizeof(float) * (size_t)n);
    }
  }
};
template <>
struct Type<BD_BFLOAT16> {
  typedef uint16_t T;
  static vf load(const uint16_t* p) { return widen(Memory<vh>::load(p)); }
  static vf load(const uint16_t* p, int n) {
    if (n >= kLanes) return load(p);
    uint16_t t[kLanes] = {};
    memcpy(t, p, sizeof(uint16_t) * (size_t)n);
    return load(t);
  }
  static void store(uint16_t* p, vf v, int n) {
    const vh h = narrow(v);
    if (n >= kLanes) {
      Memory<vh>::store(p, h);
    } else {
      uint16_t t[kLanes];
      Memory<vh>::store(t, h);
      memcpy(p, t, sizeof(uint16_t) * (size_t)n);
    }
  }
};

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

void pack_pixels(const void* x, int dtype, int64_t pixels, int64_t x_step, int64_t c, const float* beta, uint32_t* out,
                 const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step, float* acc, double* lanes) {
  const auto run = dtype == BD_FLOAT32 ? (acc ? pack_typed<BD_FLOAT32, true> : pack_typed<BD_FLOAT32, false>)
                                       : (acc ? pack_typed<BD_BFLOAT16, true> : pack_typed<BD_BFLOAT16, false>);
  run(x, pixels, x_step, c, beta, out, pixel_offset, pixel_step, word_step, acc, lanes);
}

template <int D, bool Full>
inline void finish_lanes(const int32_t* counts, int64_t count_step, int pixels, const Epilogue& e, int at, int n) {
  typedef Type<D> Ty;
  typedef typename Ty::T T;
  typedef Type<BD_FLOAT32> F;
  if (Full) n = kLanes;
  // Everything the loop reads is copied first: the compiler must assume that a store to y changes what e points to.
  const vf scale = F::load(e.scale + at, n), bias = F::load(e.bias + at, n);
  const vf slope = e.slope ? F::load(e.slope + at, n) : vf{};
  const vf post = e.post ? F::load(e.post + at, n) : vf{};
  const bool has_slope = e.slope != nullptr, has_post = e.post != nullptr;
  const void* const* const source = e.source;
  const float* const buffer = e.buffer;
  const int64_t members = e.source_sum, stride = e.source_stride, buffer_step = e.buffer_step, y_step = e.y_step;
  const int64_t from = members == 1 ? (e.source_channel + at) % e.source_wrap : e.source_channel + at;
  const vf divisor = splat((float)members);
  const int32_t* const kvalid = e.kvalid;
  const int kvalid_step = e.kvalid_step;
  T* y = (T*)e.y + at;
  for (int p = 0; p < pixels; ++p, y += y_step) {
    const vi count = Memory<vi>::load(counts + p * count_step + at);
    const vi dot = splat(kvalid[p * kvalid_step]) - (count << 1);
    vf v = to_float(dot) * scale + bias;
    if (source) {
      const T* x = (const T*)source[p] + from;
      vf s = Ty::load(x, n);
      if (members > 1) {
        for (int64_t j = 1; j < members; ++j) s += Ty::load(x + j * stride, n);
        s = s / divisor;
      }
      v += s;
    }
    if (buffer) v += F::load(buffer + p * buffer_step + at, n);
    if (has_slope) v = choose_positive(v, v * slope);
    if (has_post) v += post;
    Ty::store(y, v, n);
  }
}

template <int D>
void finish_typed(const int32_t* counts, int64_t count_step, int pixels, const Epilogue& e) {
  int at = 0;
  for (; at + kLanes <= e.channels; at += kLanes) finish_lanes<D, true>(counts, count_step, pixels, e, at, kLanes);
  if (at < e.channels) finish_lanes<D, false>(counts, count_step, pixels, e, at, e.channels - at);
}

void finish_block(const int32_t* counts, int64_t count_step, int pixels, const Epilogue& e) {
  if (e.dtype == BD_FLOAT32) {
    finish_typed<BD_FLOAT32>(counts, count_step, pixels, e);
  } else {
    finish_typed<BD_BFLOAT16>(counts, count_step, pixels, e);
  }
}

template <int D>
void average_typed(const void* const* pixels, int n, int64_t c, float* out) {
  typedef Type<D> Ty;
  for (int64_t i = 0; i < c; i += kLanes) {
    const int lanes = lanes_at(c, i);
    vf s = {};
    for (int p = 0; p < n; ++p) s += Ty::load((const typename Ty::T*)pixels[p] + i, lanes);
    Type<BD_FLOAT32>::store(out + i, s / splat((float)(n > 0 ? n : 1)), lanes);
  }
}

void average_pixels(const void* const* pixels, int n, int dtype, int64_t c, float* out) {
  if (dtype == BD_FLOAT32) {
    average_typed<BD_FLOAT32>(pixels, n, c, out);
  } else {
    average_typed<BD_BFLOAT16>(pixels, n, c, out);
  }
}

// Channel i goes into group i mod m; each group is averaged.
template <int D>
void fuse_down(const typename Type<D>::T* x, int64_t cin, int64_t m, float* out) {
  typedef Type<D> Ty;
  const int64_t whole = cin / m, larger = cin % m;
  for (int64_t i = 0; i < m;) {
    // The first `larger` groups hold one channel more.
    const bool more = i < larger;
    const int64_t end = more ? larger : m;
    const int lanes = lanes_at(end, i);
    const int64_t members = whole + (more ? 1 : 0);
    vf s = Ty::load(x + i, lanes);
    for (int64_t j = 1; j < members; ++j) s += Ty::load(x + i + j * m, lanes);
    Type<BD_FLOAT32>::store(out + i, s / splat((float)members), lanes);
    i += lanes;
  }
}

template <int D>
void fuse_typed(const void* pixel, int64_t cin, int64_t cout, float* out) {
  typedef Type<D> Ty;
  const typename Ty::T* x = (const typename Ty::T*)pixel;
  if (cout < cin) return fuse_down<D>(x, cin, cout, out);
  for (int64_t copy = 0; copy < cout / cin; ++copy)
    for (int64_t i = 0; i < cin; i += kLanes) {
      const int lanes = lanes_at(cin, i);
      Type<BD_FLOAT32>::store(out + copy * cin + i, Ty::load(x + i, lanes), lanes);
    }
  const int64_t rest = cout % cin;
  if (rest) fuse_down<D>(x, cin, rest, out + cout - rest);
}

void fuse_pixel(const void* pixel, int dtype, int64_t cin, int64_t cout, float* out) {
  if (dtype == BD_FLOAT32) {
    fuse_typed<BD_FLOAT32>(pixel, cin, cout, out);
  } else {
    fuse_typed<BD_BFLOAT16>(pixel, cin, cout, out);
  }
}

template <int D>
void accumulate_typed(const void* data, const float* factor, int64_t n, float* out) {
  typedef Type<D> Ty;
  typedef Type<BD_FLOAT32> F;
  const typename Ty::T* x = (const typename Ty::T*)data;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = lanes_at(n, i);
    vf v = Ty::load(x + i, lanes);
    if (factor) v *= F::load(factor + i, lanes);
    F::store(out + i, F::load(out + i, lanes) + v, lanes);
  }
}

void accumulate_row(const void* x, int dtype, const float* factor, int64_t n, float* out) {
  if (dtype == BD_FLOAT32) {
    accumulate_typed<BD_FLOAT32>(x, factor, n, out);
  } else {
    accumulate_typed<BD_BFLOAT16>(x, factor, n, out);
  }
}

}  // namespace
}  // namespace bd
#endif
