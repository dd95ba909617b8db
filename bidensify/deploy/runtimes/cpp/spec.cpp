#include "spec.h"

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>

namespace bidensify {
namespace {

constexpr int64_t kLargest = 1 << 20, kLargestGeometry = 4096, kLongestSum = 1 << 24;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

}  // namespace

bool Message::say(const char* format, ...) {
  if (text[0] != 0) return false;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return false;
}

bool Spec::read(const int64_t* ints, size_t count, Message& why) {
  const int64_t version = count ? ints[0] : 0;
  if (version < 1 || version > kSpecVersion)
    return why.say("a layer of version %lld; this runtime runs 1 to %lld: build a newer one", (long long)version,
                   (long long)kSpecVersion);
  // In the order of PackedSpec's fields.
  int64_t* const fields[] = {
      &kind, &in_channels, &out_channels, &kernel[0], &kernel[1], &stride[0], &stride[1], &padding[0], &padding[1],
      &padding[2], &padding[3], &dilation[0], &dilation[1], &groups, &output_padding[0], &output_padding[1], &same,
      &mean_threshold, &shift, &alpha, &levels, &custom, &bypass, &bypass_padding[0], &bypass_padding[1], &slope, &post,
      &offset, &rise, &clamp, &bypass_last, &planes};
  constexpr size_t wanted = sizeof fields / sizeof fields[0];
  const size_t first = version == 1 ? 1 : 2;
  if (count != wanted + first)
    return why.say("a layer of version %lld has %zu integers, got %zu", (long long)version, wanted + first, count);
  for (size_t i = 0; i < wanted; ++i) *fields[i] = ints[i + first];
  inner = version == 1 ? 0 : ints[1];
  if (inner < 0 || inner > (kParts | kResult) || (inner && kind == kLinear))
    return why.say("%lld does not say where the channels of a layer of kind %lld are", (long long)inner, (long long)kind);

  if (kind < kConv || kind > kLinear) return why.say("kind=%lld is none of 0 to 2", (long long)kind);
  for (int64_t v : {in_channels, out_channels, groups})
    if (v < 1 || v > kLargest) return why.say("a channel count or groups of %lld is not within 1..%lld", (long long)v, (long long)kLargest);
  for (int64_t v : {kernel[0], kernel[1], stride[0], stride[1], dilation[0], dilation[1]})
    if (v < 1 || v > kLargestGeometry) return why.say("a kernel, stride or dilation of %lld is not within 1..4096", (long long)v);
  for (int64_t v : {padding[0], padding[1], padding[2], padding[3], output_padding[0], output_padding[1], bypass_padding[0],
                    bypass_padding[1]})
    if (v < 0 || v > kLargestGeometry) return why.say("a padding of %lld is not within 0..4096", (long long)v);
  for (int64_t v : {same, mean_threshold, shift, alpha, levels, custom, bypass, slope, post, offset, rise, clamp, bypass_last})
    if (v != 0 && v != 1) return why.say("a flag of %lld is neither 0 nor 1", (long long)v);
  if (in_channels % groups || out_channels % groups)
    return why.say("groups=%lld does not divide %lld and %lld channels", (long long)groups, (long long)in_channels,
                   (long long)out_channels);
  if (planes < 1 || planes > 2) return why.say("%lld bit planes of activations; there are 1 or 2", (long long)planes);
  if (in_channels / groups * kernel[0] * kernel[1] * (2 * planes - 1) >= kLongestSum)
    return why.say("a sum of %lld products is no longer exact", (long long)(in_channels / groups * kernel[0] * kernel[1]));
  if (custom && (mean_threshold || shift || alpha || levels)) return why.say("a custom binarizer with stored thresholds");
  if (rise && !slope) return why.say("rise is stored without slope");
  if (alpha && levels) return why.say("alpha and levels exclude each other");
  const bool padded = padding[0] || padding[1] || padding[2] || padding[3];
  const bool flat = kernel[0] == 1 && kernel[1] == 1 && stride[0] == 1 && stride[1] == 1 && dilation[0] == 1 &&
                    dilation[1] == 1 && groups == 1 && !padded;
  if (kind == kLinear && !flat) return why.say("a linear layer with a kernel, stride, padding, dilation or groups");
  if (kind != kTransposed && (output_padding[0] || output_padding[1]))
    return why.say("output_padding belongs to a transposed convolution");
  if (same && (kind != kConv || padded)) return why.say("same padding belongs to a convolution without padding of its own");
  return true;
}

int Spec::tiles_shape(int64_t shape[6]) const {
  if (depthwise()) {
    shape[0] = kernel[0], shape[1] = kernel[1], shape[2] = (in_channels + 31) / 32;
    return 3;
  }
  shape[0] = groups, shape[1] = (out_channels / groups + 15) / 16, shape[2] = kernel[0], shape[3] = kernel[1];
  shape[4] = (in_channels / groups + 31) / 32, shape[5] = 16;
  return 6;
}

Spec::Side Spec::side() const {
  Side s;
  int64_t at = 0;
  auto take = [&at](bool stored, int64_t length) {
    const int64_t start = stored ? at : -1;
    at += stored ? length : 0;
    return start;
  };
  s.k = take(mean_threshold, in_channels);
  s.b = take(shift, in_channels);
  s.a = take(alpha, 1);
  s.levels = take(levels, 2);
  s.scale = take(true, out_channels);
  s.bias = take(true, out_channels);
  s.slope = take(slope, out_channels);
  s.post = take(post, out_channels);
  s.offset = take(offset, out_channels);
  s.rise = take(rise, out_channels);
  s.clamp = take(clamp, 2);
  s.length = at;
  return s;
}

void Spec::pads(const int64_t size[2], int64_t out[4]) const {
  std::copy(padding, padding + 4, out);
  for (int axis = 0; same && axis < 2; ++axis) {
    const int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1, steps = (size[axis] + stride[axis] - 1) / stride[axis] - 1;
    const int64_t total = std::max<int64_t>(steps * stride[axis] + reach - size[axis], 0);
    out[axis] = total / 2;
    out[axis + 2] = total - total / 2;
  }
}

void Spec::output_size(const int64_t size[2], int64_t out[2]) const {
  int64_t pad[4];
  pads(size, pad);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1, both = pad[axis] + pad[axis + 2];
    out[axis] = kind == kTransposed ? (size[axis] - 1) * stride[axis] - both + reach + output_padding[axis]
                                    : floor_div(size[axis] + both - reach, stride[axis]) + 1;
  }
}

bool Spec::averages(const int64_t size[2], const int64_t out[2]) const {
  if (size[0] == out[0] && size[1] == out[1]) return false;
  if (kind == kTransposed || std::max(stride[0], stride[1]) == 1 || std::max(dilation[0], dilation[1]) > 1) return false;
  for (int axis = 0; axis < 2; ++axis) {
    if (2 * bypass_padding[axis] > kernel[axis]) return false;
    if (floor_div(size[axis] + 2 * bypass_padding[axis] - kernel[axis], stride[axis]) + 1 != out[axis]) return false;
  }
  return true;
}

void Spec::sources(int axis, int64_t size, int64_t out, std::vector<int32_t>& table) const {
  table.resize((size_t)out);
  int64_t start = 0, step = stride[axis], pad = bypass_padding[axis];
  const int64_t reach = dilation[axis] * (kernel[axis] - 1);
  if (kind == kTransposed) {
    start = pad - floor_div(reach + 1 - step, 2);
  } else {
    // For "same" padding computed from the input's size the pad is half of what the output needs.
    if (floor_div(size + 2 * pad - reach - 1, step) + 1 != out)
      pad = std::max<int64_t>(0, (out - 1) * step + reach + 1 - size) / 2;
    start = reach / 2 - pad;
  }
  for (int64_t i = 0; i < out; ++i) {
    const int64_t at = kind == kTransposed ? floor_div(i + start, step) : i * step + start;
    table[(size_t)i] = (int32_t)std::min(std::max<int64_t>(at, 0), size - 1);
  }
}

}  // namespace bidensify
