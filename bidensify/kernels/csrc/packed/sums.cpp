// Sums of tensors between packed layers, with the activation behind them, in one pass.
#include <algorithm>
#include <exception>
#include <vector>

#include "kernels.h"
#include "phases.h"

namespace bd {
namespace {

// Floats that are summed at a time: small beside a first-level cache.
constexpr int64_t kStretch = 1024;

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// Chosen when the library is loaded.
#define BD_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define BD_WIDE
#endif

BD_WIDE void add(const float* x, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] + x[i];
}

BD_WIDE void add_two(const float* a, const float* b, float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}

// In the order of rounding of the training kernels' RPReLU (csrc/train/post.inc).
BD_WIDE void activate(const float* __restrict before, const float* __restrict slope, const float* __restrict after, float* __restrict y,
                      int64_t pixels, int64_t channels) {
  for (int64_t p = 0; p < pixels; ++p, y += channels)
    for (int64_t c = 0; c < channels; ++c) {
      const float u = y[c] + before[c], v = u * slope[c];
      y[c] = (u >= 0 ? u : v) + after[c];
    }
}

void sum_row(const bd_sum_args& a, int64_t row, int64_t step) {
  const int64_t sample = row / a.h, r = row % a.h;
  const float* from[16];
  for (int32_t i = 0; i < a.count; ++i) {
    const bd_part& part = a.parts[i];
    const int64_t height = a.h / part.up_h, width = a.w / part.up_w;
    from[i] = static_cast<const float*>(part.x) + (sample * height + r / part.up_h) * width * a.c;
  }
  float* y = a.y + row * a.w * a.c;
  for (int64_t p = 0; p < a.w; p += step) {
    const int64_t pixels = std::min(step, a.w - p), n = pixels * a.c;
    float* to = y + p * a.c;
    auto at = [&](int32_t i) { return from[i] + p / a.parts[i].up_w * a.c; };
    add_two(at(0), at(1), to, n);
    for (int32_t i = 2; i < a.count; ++i) add(at(i), to, n);
    if (a.slope != nullptr) activate(a.bias_in, a.slope, a.bias_out, to, pixels, a.c);
  }
}

bool sound(const bd_sum_args* a) {
  if (a == nullptr || a->n < 1 || a->h < 1 || a->w < 1 || a->c < 1 || a->threads < 1 || a->y == nullptr) return false;
  if (a->parts == nullptr || a->count < 2 || a->count > 16) return false;
  if (a->slope != nullptr && (a->bias_in == nullptr || a->bias_out == nullptr)) return false;
  for (int32_t i = 0; i < a->count; ++i) {
    const bd_part& part = a->parts[i];
    if (part.x == nullptr || part.channels != a->c || part.up_h < 1 || part.up_w < 1) return false;
    if (a->h % part.up_h || a->w % part.up_w) return false;
  }
  return true;
}

}  // namespace
}  // namespace bd

extern "C" int32_t bd_sum(const bd_sum_args* args) {
  if (!bd::sound(args)) return BD_BAD_ARGUMENT;
  const bd_sum_args& a = *args;
  bool whole = true;
  for (int32_t i = 0; i < a.count; ++i) whole = whole && a.parts[i].up_w == 1;
  // An upsampled part has one pixel after the other; rows of whole ones are long stretches.
  const int64_t step = whole ? std::max<int64_t>(1, bd::kStretch / a.c) : 1, rows = a.n * a.h;
  const int64_t units = std::min<int64_t>(rows, 8 * (int64_t)a.threads);
  std::vector<bd::Phase> phases;
  try {
    phases.push_back({units, [&](int64_t u) {
                        for (int64_t row = rows * u / units; row < rows * (u + 1) / units; ++row) bd::sum_row(a, row, step);
                      }, nullptr, false});
    bd::run_phases(a.threads, phases);
  } catch (const std::exception&) {
    return BD_NO_MEMORY;
  }
  return BD_OK;
}
