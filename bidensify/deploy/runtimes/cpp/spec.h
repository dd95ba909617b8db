// What a packed layer is, as the operator's integers say it; the counterpart of bidensify/deploy/spec.py.
#ifndef BIDENSIFY_SPEC_H
#define BIDENSIFY_SPEC_H

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace bidensify {

// Why something was refused; the first reason stays.
struct Message {
  char text[400] = "";
  // Returns false, so that a check can end with it.
  bool say(const char* format, ...) __attribute__((format(printf, 2, 3)));
};

// The newest version of the integers that this runtime knows; operator.py has the same.
constexpr int64_t kSpecVersion = 2;

struct Spec {
  enum Kind : int64_t { kConv = 0, kTransposed = 1, kLinear = 2 };
  int64_t kind, in_channels, out_channels;
  int64_t kernel[2], stride[2];
  int64_t padding[4];  // top, left, bottom, right
  int64_t dilation[2];
  int64_t groups;
  int64_t output_padding[2];
  int64_t same, mean_threshold, shift, alpha, levels, custom, bypass;
  int64_t bypass_padding[2];
  int64_t slope, post, offset, rise, clamp, bypass_last, planes;
  // Of version 2: parts are, the result and its residual are (N, H, W, C) in the order of their dimensions.
  enum Inner : int64_t { kParts = 1, kResult = 2 };
  int64_t inner;

  // Reads and checks all of it.
  bool read(const int64_t* ints, size_t count, Message& why);

  bool depthwise() const { return kind == kConv && groups > 1 && groups == in_channels && groups == out_channels; }
  // (groups, tiles, kh, kw, words, 16), or of a depthwise layer (kh, kw, words): returns how many.
  int tiles_shape(int64_t shape[6]) const;
  // Where each side parameter begins, -1 where it is not stored.
  struct Side {
    int64_t k, b, a, levels, scale, bias, slope, post, offset, rise, clamp, length;
  };
  Side side() const;
  // (top, left, bottom, right) for an input of this size.
  void pads(const int64_t size[2], int64_t out[4]) const;
  void output_size(const int64_t size[2], int64_t out[2]) const;

  // The bypass, as bidensify.nn.bypass has it: whether it averages windows, else the source row or column of each output one.
  bool averages(const int64_t size[2], const int64_t out[2]) const;
  void sources(int axis, int64_t size, int64_t out, std::vector<int32_t>& table) const;
};

}  // namespace bidensify
#endif
