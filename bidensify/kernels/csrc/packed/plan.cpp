#include "plan.h"

#include <stddef.h>

namespace bd {

void taps_at(const Axis& axis, int64_t o, std::vector<Tap>& taps) {
  taps.clear();
  for (int32_t k = 0; k < axis.k; ++k) {
    int64_t at;
    if (axis.transposed) {
      // out = in * stride - pad + k * dilation
      const int64_t scaled = o + axis.pad - (int64_t)k * axis.dilation;
      if (scaled < 0 || scaled % axis.stride != 0) continue;
      at = scaled / axis.stride;
    } else {
      at = o * axis.stride - axis.pad + (int64_t)k * axis.dilation;
      if (at < 0) continue;
    }
    if (at < axis.in) taps.push_back({k, (int32_t)at});
  }
}

std::vector<Run> make_runs(const Axis& axis) {
  std::vector<Run> runs;
  const int64_t phases = axis.transposed ? axis.stride : 1;
  const int64_t in_step = axis.transposed ? 1 : axis.stride;
  std::vector<Tap> taps;
  for (int64_t phase = 0; phase < phases && phase < axis.out; ++phase) {
    bool fresh = true;
    for (int64_t o = phase; o < axis.out; o += phases) {
      taps_at(axis, o, taps);
      bool same = !fresh && taps.size() == runs.back().taps.size();
      if (same)
        for (size_t i = 0; i < taps.size() && same; ++i) same = taps[i].k == runs.back().taps[i].k;
      if (same) {
        ++runs.back().count;
      } else {
        runs.push_back({o, phases, 1, in_step, taps});
        fresh = false;
      }
    }
  }
  return runs;
}

}  // namespace bd
