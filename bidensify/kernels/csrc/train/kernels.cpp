// Compiled once per instruction set with BDT_TIER naming the function that hands out the table.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "tier.h"

namespace {

#include "common.inc"
#include "dab.inc"
#include "post.inc"

template <class T>
void dab_forward_typed(const bdt_shape& d, const bdt_dab& a) {
  if (!d.last) return dab_forward_first<T>(d, a);
  with_channels(d.c, [&](auto cc) { dab_forward_last<T, cc.value>(d, a); });
}

template <class T, bool TWO>
void dab_backward_of(const bdt_shape& d, const bdt_dab_grad& a) {
  if (!d.last) return dab_backward_first<T, TWO>(d, a);
  with_channels(d.c, [&](auto cc) { dab_backward_last<T, cc.value, TWO>(d, a); });
}

template <class T>
void dab_backward_chosen(const bdt_shape& d, const bdt_dab_grad& a) {
  two_planes(a.scale) ? dab_backward_of<T, true>(d, a) : dab_backward_of<T, false>(d, a);
}

void dab_forward(const bdt_shape& d, const bdt_dab& a) { d.half ? dab_forward_typed<uint16_t>(d, a) : dab_forward_typed<float>(d, a); }
void dab_again(const bdt_shape& d, const bdt_dab& a) { d.half ? dab_again_typed<uint16_t>(d, a) : dab_again_typed<float>(d, a); }
void dab_backward(const bdt_shape& d, const bdt_dab_grad& a) {
  d.half ? dab_backward_chosen<uint16_t>(d, a) : dab_backward_chosen<float>(d, a);
}

void moments(const bdt_shape& d, const void* x, float* mean, float* variance) {
  d.half ? moments_typed(d, (const uint16_t*)x, mean, variance) : moments_typed(d, (const float*)x, mean, variance);
}

template <class T>
void post_forward_chosen(const bdt_shape& d, const bdt_post& a) {
  if (a.bypass != nullptr)
    a.slope != nullptr ? post_forward_typed<T, true, true>(d, a) : post_forward_typed<T, true, false>(d, a);
  else
    a.slope != nullptr ? post_forward_typed<T, false, true>(d, a) : post_forward_typed<T, false, false>(d, a);
}

void post_forward(const bdt_shape& d, const bdt_post& a) { d.half ? post_forward_chosen<uint16_t>(d, a) : post_forward_chosen<float>(d, a); }

template <class T>
void post_backward_chosen(const bdt_shape& d, const bdt_post_grad& a) {
  const bdt_post& f = a.forward;
  if (f.slope == nullptr)
    post_backward_typed<T, false, false>(d, a);
  else
    f.bypass != nullptr ? post_backward_typed<T, true, true>(d, a) : post_backward_typed<T, false, true>(d, a);
}

void post_backward(const bdt_shape& d, const bdt_post_grad& a) {
  d.half ? post_backward_chosen<uint16_t>(d, a) : post_backward_chosen<float>(d, a);
}

const bdt::Tier table = {dab_forward,  dab_again,     dab_backward,   moments,
                         post_forward, post_backward, weight_forward, weight_backward};

}  // namespace

namespace bdt {
const Tier* BDT_TIER() { return &table; }
}  // namespace bdt
