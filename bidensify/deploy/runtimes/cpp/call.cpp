#include "call.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <initializer_list>

namespace bidensify {
namespace {

// Of one sample: what bits and sums are kept for must stay addressable.
constexpr int64_t kLargestSample = int64_t{1} << 33;
const char* const kNames[BD_TIERS] = {"portable", "avx2", "avx512", "neon"};

const char* name(Type type) {
  switch (type) {
    case Type::kFloat32: return "float32";
    case Type::kBFloat16: return "bfloat16";
    case Type::kInt32: return "int32";
    default: return "another dtype";
  }
}

struct Text {
  char chars[160];
};

Text shape(const int64_t* sizes, int dims) {
  Text text;
  size_t at = (size_t)snprintf(text.chars, sizeof text.chars, "(");
  for (int i = 0; i < dims && at + 32 < sizeof text.chars; ++i)
    at += (size_t)snprintf(text.chars + at, sizeof text.chars - at, "%s%lld", i ? ", " : "", (long long)sizes[i]);
  snprintf(text.chars + at, sizeof text.chars - at, ")");
  return text;
}

// A tensor that kernels read in the order of its dimensions.
bool check(const char* what, const View& view, Type type, std::initializer_list<int64_t> sizes, Message& why) {
  const bool fits = view.dims == (int)sizes.size() && std::equal(sizes.begin(), sizes.end(), view.sizes);
  if (fits && view.type == type && view.plain) return true;
  return why.say("%s of shape %s, %s%s must be %s, %s, contiguous", what, shape(view.sizes, view.dims).chars, name(view.type),
                 view.plain ? "" : ", not contiguous", shape(sizes.begin(), (int)sizes.size()).chars, name(type));
}

// Pixels of channels from channels of pixels. By squares, whose lines the first-level cache holds on both sides.
template <class T>
void turn(const T* from, int64_t channels, int64_t pixels, T* to) {
  constexpr int64_t kSide = 16;
  for (int64_t p = 0; p < pixels; p += kSide)
    for (int64_t c = 0; c < channels; c += kSide) {
      const int64_t rows = std::min(kSide, pixels - p), columns = std::min(kSide, channels - c);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) to[(p + i) * channels + c + j] = from[(c + j) * pixels + p + i];
    }
}

// (N, H, W, C) in the order of its dimensions as the image in channels_last that it is.
void name_channels(View& view) {
  if (view.dims != 4) return;
  view.last = view.plain, view.plain = false;
  std::rotate(view.sizes + 1, view.sizes + 3, view.sizes + 4);
}

// The part in channels_last: as it is, or turned in `room`.
const void* lasting(const View& part, std::vector<uint32_t>& room) {
  if (part.last) return part.data;
  const int64_t n = part.sizes[0], channels = part.sizes[1], pixels = part.sizes[2] * part.sizes[3], all = n * channels * pixels;
  const bool wide = part.type == Type::kFloat32;
  if (const size_t words = (size_t)(wide ? all : (all + 1) / 2); room.size() < words) room.resize(words);
  for (int64_t i = 0, step = channels * pixels; i < n; ++i) {
    if (wide) {
      turn(static_cast<const uint32_t*>(part.data) + i * step, channels, pixels, room.data() + i * step);
    } else {
      turn(static_cast<const uint16_t*>(part.data) + i * step, channels, pixels, reinterpret_cast<uint16_t*>(room.data()) + i * step);
    }
  }
  return room.data();
}

}  // namespace

bool choose_tier(int32_t* tier, Message& why) {
  const char* wanted = getenv("BIDENSIFY_KERNEL");
  const uint32_t found = bd_tiers();
  if (wanted != nullptr && wanted[0] != 0 && strcmp(wanted, "auto") != 0) {
    for (int32_t i = 0; i < BD_TIERS; ++i)
      if (strcmp(wanted, kNames[i]) == 0 && (found >> i & 1u)) {
        *tier = i;
        return true;
      }
    return why.say("BIDENSIFY_KERNEL=%s is no kernel of this processor", wanted);
  }
  *tier = BD_PORTABLE;
  for (int32_t i : {BD_NEON, BD_AVX2, BD_AVX512})
    if (found >> i & 1u) *tier = i;
  return true;
}

bool Call::read_input(Message& why) {
  const Arguments& a = *arguments_;
  const View& first = a.parts[0];
  if (first.type != Type::kFloat32 && first.type != Type::kBFloat16)
    return why.say("an input of %s; packed layers take float32 and bfloat16", name(first.type));
  if (linear()) {
    if (a.part_count != 1 || a.up[0] != 1 || first.dims < 2 || first.sizes[first.dims - 1] != spec_.in_channels || !first.plain)
      return why.say("an input of shape %s%s must be one (N, ..., %lld), contiguous", shape(first.sizes, first.dims).chars,
                     first.plain ? "" : ", not contiguous", (long long)spec_.in_channels);
    n_ = first.sizes[0], size_[0] = 1, size_[1] = 1;
    for (int i = 1; i + 1 < first.dims; ++i)
      if (__builtin_mul_overflow(size_[0], first.sizes[i], &size_[0])) return why.say("too many tokens");
    return true;
  }
  int64_t channels = 0;
  for (size_t i = 0; i < a.part_count; ++i) {
    const View& part = a.parts[i];
    if (part.dims != 4 || part.type != first.type)
      return why.say("part %zu of shape %s, %s must be 4-dimensional and %s", i, shape(part.sizes, part.dims).chars,
                     name(part.type), name(first.type));
    if (!part.last && !part.plain)
      return why.say("part %zu of shape %s lies neither in channels_last nor in the order of its dimensions", i, shape(part.sizes, 4).chars);
    if (a.up[i] < 1 || a.up[i] > 1 << 24) return why.say("part %zu is upsampled %lld times", i, (long long)a.up[i]);
    int64_t size[2];
    if (__builtin_mul_overflow(part.sizes[2], a.up[i], &size[0]) || __builtin_mul_overflow(part.sizes[3], a.up[i], &size[1]))
      return why.say("part %zu is upsampled %lld times", i, (long long)a.up[i]);
    if (i == 0) n_ = part.sizes[0], size_[0] = size[0], size_[1] = size[1];
    if (part.sizes[0] != n_ || size[0] != size_[0] || size[1] != size_[1])
      return why.say("part %zu of shape %s, upsampled %lld times, does not fit the input of %lld x %lldx%lld", i,
                     shape(part.sizes, 4).chars, (long long)a.up[i], (long long)n_, (long long)size_[0], (long long)size_[1]);
    channels += part.sizes[1];
  }
  if (channels != spec_.in_channels)
    return why.say("an input of %lld channels; the layer takes %lld", (long long)channels, (long long)spec_.in_channels);
  return true;
}

bool Call::prepare(Arguments& arguments, Message& why) {
  arguments_ = &arguments;
  Arguments& a = arguments;
  if (!spec_.read(a.spec, a.spec_count, why)) return false;
  if (a.part_count < 1 || a.part_count > (size_t)kMostParts || a.up_count != a.part_count)
    return why.say("%zu parts with %zu upsamplings; there are 1 to %d, one each", a.part_count, a.up_count, kMostParts);
  if (spec_.inner & Spec::kParts)
    for (size_t i = 0; i < a.part_count; ++i) name_channels(a.parts[i]);
  if (spec_.inner & Spec::kResult) name_channels(a.residual);
  if (!read_input(why)) return false;
  int64_t volume;
  if (__builtin_mul_overflow(size_[0], size_[1], &volume) || __builtin_mul_overflow(volume, spec_.in_channels, &volume) ||
      volume > kLargestSample)
    return why.say("an input of %lldx%lld is too large", (long long)size_[0], (long long)size_[1]);
  spec_.output_size(size_, out_);
  if (volume < 1 || out_[0] < 1 || out_[1] < 1)
    return why.say("an input of %lldx%lld gives an output of %lldx%lld; give a larger one", (long long)size_[0],
                   (long long)size_[1], (long long)out_[0], (long long)out_[1]);
  if (__builtin_mul_overflow(out_[0], out_[1], &volume) || __builtin_mul_overflow(volume, spec_.out_channels, &volume) ||
      volume > kLargestSample)
    return why.say("an output of %lldx%lld is too large", (long long)out_[0], (long long)out_[1]);

  int64_t tiles[6];
  const int dims = spec_.tiles_shape(tiles);
  const bool fits = dims == 3 ? check("tiles", a.tiles, Type::kInt32, {tiles[0], tiles[1], tiles[2]}, why)
                              : check("tiles", a.tiles, Type::kInt32,
                                      {tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5]}, why);
  if (!fits || !check("side", a.side, Type::kFloat32, {spec_.side().length}, why)) return false;
  if (a.thresholds.data && !check("thresholds", a.thresholds, Type::kFloat32, {n_, spec_.in_channels}, why)) return false;
  if (a.levels.data && !check("levels", a.levels, Type::kFloat32, {n_, 2}, why)) return false;
  if (a.levels.data && spec_.alpha) return why.say("levels are given to a layer that has a scale of its own");

  const View& x = a.parts[0];
  out_dims_ = x.dims;
  if (linear()) {
    std::copy(x.sizes, x.sizes + x.dims, out_sizes_);
    out_sizes_[x.dims - 1] = spec_.out_channels;
  } else {
    const int64_t sizes[] = {n_, spec_.out_channels, out_[0], out_[1]};
    std::copy(sizes, sizes + 4, out_sizes_);
  }
  const View& r = a.residual;
  if (r.data && (r.dims != out_dims_ || !std::equal(out_sizes_, out_sizes_ + out_dims_, r.sizes) || r.type != x.type ||
                 !(linear() ? r.plain : r.last)))
    return why.say("a residual of shape %s, %s must be %s, %s, %s", shape(r.sizes, r.dims).chars, name(r.type),
                   shape(out_sizes_, out_dims_).chars, name(x.type), linear() ? "contiguous" : "channels_last");
  if (spec_.inner & Spec::kResult) std::rotate(out_sizes_ + 1, out_sizes_ + 2, out_sizes_ + 4);
  return true;
}

bool Call::run(void* y, int32_t tier, int32_t threads, Message& why) {
  // Kept from call to call: no memory is asked for once the largest layer has run.
  static thread_local std::vector<int32_t> rows, columns;
  static thread_local std::vector<uint32_t> turned[kMostParts];
  const Arguments& a = *arguments_;
  if (n_ == 0) return true;
  bd_conv_args c;
  memset(&c, 0, sizeof c);
  int64_t pad[4];
  spec_.pads(size_, pad);
  c.n = n_, c.h = size_[0], c.w = size_[1], c.cin = spec_.in_channels, c.oh = out_[0], c.ow = out_[1], c.cout = spec_.out_channels;
  c.kh = (int32_t)spec_.kernel[0], c.kw = (int32_t)spec_.kernel[1], c.sh = (int32_t)spec_.stride[0], c.sw = (int32_t)spec_.stride[1];
  c.dh = (int32_t)spec_.dilation[0], c.dw = (int32_t)spec_.dilation[1], c.pad_top = (int32_t)pad[0], c.pad_left = (int32_t)pad[1];
  c.groups = (int32_t)spec_.groups, c.transposed = spec_.kind == Spec::kTransposed, c.depthwise = spec_.depthwise();
  c.planes = (int32_t)spec_.planes, c.dtype = type() == Type::kFloat32 ? BD_FLOAT32 : BD_BFLOAT16;
  c.bypass_last = (int32_t)spec_.bypass_last, c.tier = tier, c.threads = std::max(threads, 1);
  if (spec_.bypass) {
    c.bypass_pad_h = (int32_t)spec_.bypass_padding[0], c.bypass_pad_w = (int32_t)spec_.bypass_padding[1];
    c.bypass = spec_.averages(size_, out_) ? BD_BYPASS_AVERAGE : BD_BYPASS_INDEX;
    if (c.bypass == BD_BYPASS_INDEX && (size_[0] != out_[0] || size_[1] != out_[1])) {
      try {
        spec_.sources(0, size_[0], out_[0], rows);
        spec_.sources(1, size_[1], out_[1], columns);
      } catch (const std::exception&) {
        return why.say("no memory for the bypass of %lldx%lld", (long long)out_[0], (long long)out_[1]);
      }
      c.rows = rows.data(), c.cols = columns.data();
    }
  }
  const void* data[kMostParts];
  try {
    for (size_t i = 0; i < a.part_count; ++i) data[i] = linear() ? a.parts[i].data : lasting(a.parts[i], turned[i]);
  } catch (const std::exception&) {
    return why.say("no memory to turn an input of %lld x %lldx%lld", (long long)n_, (long long)size_[0], (long long)size_[1]);
  }
  c.x = data[0], c.y = y, c.residual = a.residual.data;
  c.tiles = static_cast<const uint32_t*>(a.tiles.data), c.tiles_length = 1;
  for (int i = 0; i < a.tiles.dims; ++i) c.tiles_length *= a.tiles.sizes[i];
  const float* side = static_cast<const float*>(a.side.data);
  const Spec::Side at = spec_.side();
  auto parameter = [side](int64_t start) { return start < 0 ? nullptr : side + start; };
  c.k = parameter(at.k), c.b = parameter(at.b), c.a = parameter(at.a), c.levels = parameter(at.levels);
  c.scale = parameter(at.scale), c.bias = parameter(at.bias), c.slope = parameter(at.slope), c.post = parameter(at.post);
  c.offset = parameter(at.offset), c.rise = parameter(at.rise), c.clamp = parameter(at.clamp);
  c.thresholds = static_cast<const float*>(a.thresholds.data);
  if (a.levels.data) c.levels = static_cast<const float*>(a.levels.data), c.per_sample_levels = 1;

  int32_t status;
  if (linear() || (a.part_count == 1 && a.up[0] == 1)) {
    status = bd_packed_conv2d(&c);
  } else {
    bd_part parts[kMostParts];
    for (size_t i = 0; i < a.part_count; ++i)
      parts[i] = {data[i], a.parts[i].sizes[1], (int32_t)a.up[i], (int32_t)a.up[i]};
    status = bd_packed_conv2d_parts(&c, parts, (int32_t)a.part_count);
  }
  if (status == BD_OK) return true;
  const char* reason = status == BD_NO_MEMORY   ? "there is no memory for its bits"
                       : status == BD_NO_TIER   ? "this processor lacks the kernel"
                       : spec_.planes > 1       ? "these kernels do not know it; two bit planes need newer ones"
                                                : "its arguments do not fit together";
  return why.say("a layer of %lld to %lld channels on %lld x %lldx%lld: %s", (long long)c.cin, (long long)c.cout, (long long)c.n,
                 (long long)c.h, (long long)c.w, reason);
}

}  // namespace bidensify
