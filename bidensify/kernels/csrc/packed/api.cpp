#include <exception>
#include <new>

#include "bidensify_kernels.h"
#include "kernels.h"
#include "layer.h"
#include "pool.h"

namespace {

const bd::Inner* inner_of(int32_t tier) {
  if (tier < 0 || tier >= BD_TIERS || !(bd_tiers() >> tier & 1u)) return nullptr;
  switch (tier) {
#if defined(BD_WITH_AVX2)
    case BD_AVX2: return bd::avx2_inner();
#endif
#if defined(BD_WITH_AVX512)
    case BD_AVX512: return bd::avx512_inner();
#endif
#if defined(BD_WITH_NEON)
    case BD_NEON: return bd::neon_inner();
#endif
    default: return bd::portable_inner();
  }
}

bool sound_parts(const bd_conv_args& a, const bd_part* parts, int32_t count) {
  int64_t channels = 0;
  for (int32_t i = 0; i < count; ++i) {
    const bd_part& part = parts[i];
    if (!part.x || part.channels < 1 || part.channels > a.cin || part.up_h < 1 || part.up_w < 1) return false;
    if (a.h % part.up_h || a.w % part.up_w) return false;
    channels += part.channels;
  }
  return channels == a.cin;
}

bool sound(const bd_conv_args& a) {
  const int64_t sizes[] = {a.h, a.w, a.cin, a.oh, a.ow, a.cout, a.kh, a.kw, a.sh, a.sw, a.dh, a.dw, a.groups, a.threads};
  for (int64_t size : sizes)
    if (size < 1) return false;
  if (a.n < 0 || a.pad_top < 0 || a.pad_left < 0 || a.cin % a.groups || a.cout % a.groups) return false;
  if (!a.tiles || !a.scale || !a.bias || (!a.y && !a.dots)) return false;
  if (a.dtype != BD_FLOAT32 && a.dtype != BD_BFLOAT16) return false;
  if (a.depthwise && (a.transposed || a.groups != a.cin || a.groups != a.cout)) return false;
  if (a.planes < 1 || a.planes > 2 || (a.rise && !a.slope)) return false;
  if (a.bypass < BD_BYPASS_NONE || a.bypass > BD_BYPASS_AVERAGE || (a.a && a.levels)) return false;
  const int64_t taps = (int64_t)a.kh * a.kw;
  const int64_t tiles = (a.cout / a.groups + bd::kLanes - 1) / bd::kLanes;
  const int64_t wanted = a.depthwise ? taps * ((a.cin + 31) / 32)
                                     : a.groups * tiles * taps * ((a.cin / a.groups + 31) / 32) * bd::kLanes;
  if (a.tiles_length != wanted) return false;
  if (a.bypass == BD_BYPASS_INDEX) {
    if (!a.rows != !a.cols || (!a.rows && (a.oh != a.h || a.ow != a.w))) return false;
    for (int64_t i = 0; a.rows && i < a.oh; ++i)
      if (a.rows[i] < 0 || a.rows[i] >= a.h) return false;
    for (int64_t i = 0; a.cols && i < a.ow; ++i)
      if (a.cols[i] < 0 || a.cols[i] >= a.w) return false;
  }
  return true;
}

int32_t run(const bd_conv_args& args, const bd_part* parts, int32_t count) {
  const bd::Inner* inner = inner_of(args.tier);
  if (inner == nullptr) return BD_NO_TIER;
  try {
    bd::Layer(args, *inner, parts, count).run();
  } catch (const std::exception&) {
    return BD_NO_MEMORY;
  }
  return BD_OK;
}

}  // namespace

extern "C" {

int32_t bd_abi_version(void) { return BD_ABI_VERSION; }

uint32_t bd_tiers(void) {
  static const uint32_t tiers = [] {
    uint32_t found = 1u << BD_PORTABLE;
#if defined(BD_WITH_AVX2)
    if (__builtin_cpu_supports("avx2")) found |= 1u << BD_AVX2;
#endif
#if defined(BD_WITH_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq"))
      found |= 1u << BD_AVX512;
#endif
#if defined(BD_WITH_NEON)
    found |= 1u << BD_NEON;
#endif
    return found;
  }();
  return tiers;
}

void bd_set_parallel(bd_parallel parallel) { bd::set_runtime(parallel); }

int32_t bd_packed_conv2d(const bd_conv_args* args) {
  if (args == nullptr || args->x == nullptr || !sound(*args)) return BD_BAD_ARGUMENT;
  return run(*args, nullptr, 0);
}

int32_t bd_packed_conv2d_parts(const bd_conv_args* args, const bd_part* parts, int32_t count) {
  if (args == nullptr || parts == nullptr || !sound(*args) || !sound_parts(*args, parts, count)) return BD_BAD_ARGUMENT;
  return run(*args, parts, count);
}

}  // extern "C"
