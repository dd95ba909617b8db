// The last pass's float steps, on 16-lane vectors: scale, bypass, activation; averages and fusions of the bypass.
#ifndef BIDENSIFY_INNER_FINISH_H
#define BIDENSIFY_INNER_FINISH_H

#include "inner_common.h"

namespace bd {
namespace {

// Plain: without offset, rise, clamp, and nothing joins behind the activation.
template <int D, bool Full, bool Plain>
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
  const vf offset = !Plain && e.offset ? F::load(e.offset + at, n) : vf{};
  const vf rise = !Plain && e.rise ? F::load(e.rise + at, n) : vf{};
  const float* const window = Plain || !e.offset ? nullptr : e.window;
  const float* const early = Plain ? nullptr : e.early;
  const float* const clamp = Plain ? nullptr : e.clamp;
  const vf low = splat(clamp ? clamp[0] : 0.0f), high = splat(clamp ? clamp[1] : 0.0f);
  const bool has_rise = !Plain && e.rise != nullptr, last = !Plain && e.last;
  const int64_t window_step = e.window_step;
  const void* const* const source = e.source;
  const float* const buffer = e.buffer;
  const int64_t members = e.source_sum, stride = e.source_stride, buffer_step = e.buffer_step, y_step = e.y_step;
  const int64_t from = members == 1 ? (e.source_channel + at) % e.source_wrap : e.source_channel + at;
  // A copy of the source may end, and the next one begin, among these lanes; not two, since it has as many channels at least.
  const int before = (int)(e.source_wrap - from);
  const bool two = members == 1 && before < n;
  const vf divisor = splat((float)members);
  const int32_t* const kvalid = e.kvalid;
  const int kvalid_step = e.kvalid_step;
  T* y = (T*)e.y + at;
  for (int p = 0; p < pixels; ++p, y += y_step) {
    const vi count = Memory<vi>::load(counts + p * count_step + at);
    const vi dot = splat(kvalid[p * kvalid_step]) - (count << 1);
    vf v = to_float(dot) * scale + bias, s = {};
    bool signal = false;
    if (source) {
      const T* x = (const T*)source[p] + from;
      s = two ? Ty::load_two(x, x - from - before, before, n) : Ty::load(x, n);
      if (members > 1) {
        for (int64_t j = 1; j < members; ++j) s += Ty::load(x + j * stride, n);
        s = s / divisor;
      }
      if (Plain) v += s;
      signal = true;
    } else if (buffer) {
      s = F::load(buffer + p * buffer_step + at, n);
      if (Plain) v += s;
      signal = true;
    }
    if (!Plain) {
      vf extra = {};
      bool more = signal && !last;
      if (more) extra = s;
      if (early) {
        const vf found = F::load(early + p * buffer_step + at, n);
        extra = more ? extra + found : found;
        more = true;
      }
      if (window) {
        const vf found = splat(window[p * window_step]) * offset;
        extra = more ? extra + found : found;
        more = true;
      }
      if (more) v += extra;
    }
    if (has_slope) v = choose_positive(v, v * slope, has_rise ? v * rise : v);
    if (clamp) v = bounded(v, low, high);
    if (has_post) v += post;
    if (last && signal) v += s;
    Ty::store(y, v, n);
  }
}

template <int D, bool Plain>
void finish_chosen(const int32_t* counts, int64_t count_step, int pixels, const Epilogue& e) {
  int at = 0;
  for (; at + kLanes <= e.channels; at += kLanes) finish_lanes<D, true, Plain>(counts, count_step, pixels, e, at, kLanes);
  if (at < e.channels) finish_lanes<D, false, Plain>(counts, count_step, pixels, e, at, e.channels - at);
}

template <int D>
void finish_typed(const int32_t* counts, int64_t count_step, int pixels, const Epilogue& e) {
  const bool plain = !e.offset && !e.rise && !e.clamp && !e.early && !e.last;
  plain ? finish_chosen<D, true>(counts, count_step, pixels, e) : finish_chosen<D, false>(counts, count_step, pixels, e);
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
