// Which input taps an output row or a run of output columns has. Taps outside the image are left out: zero padding
// contributes exactly nothing, and K_valid counts only what is inside.
#ifndef BIDENSIFY_PLAN_H
#define BIDENSIFY_PLAN_H

#include <stdint.h>

#include <vector>

#include "kernels.h"

namespace bd {

// One valid tap along an axis: kernel index and input index.
struct Tap {
  int32_t k;
  int32_t at;
};

// Output positions start, start + step, ... (count of them) that share one set of kernel taps.
struct Run {
  int64_t start, step, count;
  int64_t in_step;          // input positions advance by this from one output position to the next
  std::vector<Tap> taps;    // `at` is the input position of the run's first output position
};

struct Axis {
  int64_t in, out;
  int32_t k, stride, dilation, pad;
  bool transposed;
};

// The valid taps of output position o.
void taps_at(const Axis& axis, int64_t o, std::vector<Tap>& taps);
// All output positions, grouped in runs.
std::vector<Run> make_runs(const Axis& axis);

}  // namespace bd
#endif
