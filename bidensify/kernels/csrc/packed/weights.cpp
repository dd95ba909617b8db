// Signs of float weights to the words that gemm and depthwise read.
#include <string.h>

#include "kernels.h"

namespace bd {
namespace {

// Bit i of the result is set where w[i * step] >= 0.
inline uint32_t word(const float* w, int64_t step, int64_t count) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= (uint32_t)(w[i * step] >= 0.0f) << i;
  return bits;
}

}  // namespace
}  // namespace bd

extern "C" int32_t bd_weight_tiles(const bd_conv_args* args, const float* w, const int64_t* strides, uint32_t* tiles) {
  if (args == nullptr || w == nullptr || strides == nullptr || tiles == nullptr) return BD_BAD_ARGUMENT;
  const bd_conv_args& a = *args;
  if (a.groups < 1 || a.cin % a.groups || a.cout % a.groups || a.transposed) return BD_BAD_ARGUMENT;
  const int64_t per_group = a.cin / a.groups, outs = a.cout / a.groups, taps = (int64_t)a.kh * a.kw;
  if (a.depthwise) {
    const int64_t words = (a.cin + 31) / 32;
    if (a.tiles_length != taps * words) return BD_BAD_ARGUMENT;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t t = 0; t < words; ++t)
        tiles[tap * words + t] = bd::word(w + tap / a.kw * strides[2] + tap % a.kw * strides[3] + t * 32 * strides[0], strides[0],
                                          a.cin - t * 32 < 32 ? a.cin - t * 32 : 32);
    return BD_OK;
  }
  const int64_t words = (per_group + 31) / 32, count = (outs + bd::kLanes - 1) / bd::kLanes;
  if (a.tiles_length != a.groups * count * taps * words * bd::kLanes) return BD_BAD_ARGUMENT;
  memset(tiles, 0, (size_t)a.tiles_length * 4);
  for (int64_t o = 0; o < a.cout; ++o) {
    const int64_t g = o / outs, at = o % outs;
    uint32_t* out = tiles + (g * count + at / bd::kLanes) * taps * words * bd::kLanes + at % bd::kLanes;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* from = w + o * strides[0] + tap / a.kw * strides[2] + tap % a.kw * strides[3];
      for (int64_t t = 0; t < words; ++t)
        out[(tap * words + t) * bd::kLanes] =
            bd::word(from + t * 32 * strides[1], strides[1], per_group - t * 32 < 32 ? per_group - t * 32 : 32);
    }
  }
  return BD_OK;
}
