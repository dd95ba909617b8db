// Evaluation, as bidensify/exact defines it: every rounding counts, so this is compiled without contraction, and
// sums keep their order. Compiled once per instruction set with BDT_EVALUATION naming the function that hands out the table.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "tier.h"

namespace {

#include "common.inc"

constexpr int64_t kSpan = 64;  // positions per block of the definition
constexpr int64_t kParts = 32;
constexpr double kBestStep = 1.248;  // of four levels of a Gaussian, in its mean distances

// Spans of one sample, split into parts that threads take.
struct Split {
  int64_t spans, parts;
  explicit Split(const bdt_shape& d) : spans((d.s + kSpan - 1) / kSpan), parts(std::min(spans, kParts)) {}
  int64_t first(int64_t part) const { return spans * part / parts; }
};

// acc[i] += (v(0, i) + v(1, i)) + (v(2, i) + v(3, i)), a missing row counting as 0.
template <int ROWS, class F>
inline void quad(int64_t c, float* acc, F v) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    float sum = v(0, i);
    if (ROWS > 1) sum = sum + v(1, i);
    if (ROWS == 3) sum = sum + v(2, i);
    if (ROWS == 4) sum = sum + (v(2, i) + v(3, i));
    acc[i] += sum;
  }
}

template <class T, int ROWS>
inline void sum_quad(const T* x, int64_t c, float* acc) {
  quad<ROWS>(c, acc, [=](int r, int64_t i) { return load(x + r * c + i); });
}

template <class T>
void sum_span(const T* x, int64_t rows, int64_t c, float* acc) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) sum_quad<T, 4>(x + r * c, c, acc);
  switch (rows - r) {
    case 1: return sum_quad<T, 1>(x + r * c, c, acc);
    case 2: return sum_quad<T, 2>(x + r * c, c, acc);
    case 3: return sum_quad<T, 3>(x + r * c, c, acc);
    default: return;
  }
}

template <class T>
inline void sign_row(const T* x, int64_t c, const float* beta, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) y[i] = load(x + i) >= beta[i] ? 1.0f : -1.0f;
}

// 2 s1 + s2, s2 the sign of what s1 leaves.
template <class T>
inline void level_row(const T* x, int64_t c, const float* beta, float step, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    const float v = load(x + i), up = beta[i] + step, down = beta[i] - step;
    const bool first = v >= beta[i];
    y[i] = (first ? 2.0f : -2.0f) + (v >= (first ? up : down) ? 1.0f : -1.0f);
  }
}

// Distances, and with Signs -1 and +1.
template <class T, int ROWS, bool Signs>
inline void code_quad(const T* x, int64_t c, const float* beta, float* y, float* acc) {
  quad<ROWS>(c, acc, [=](int r, int64_t i) {
    const float v = load(x + r * c + i);
    if (Signs) y[r * c + i] = v >= beta[i] ? 1.0f : -1.0f;
    return std::fabs(v - beta[i]);
  });
}

template <class T, bool Signs>
void code_span(const T* x, int64_t rows, int64_t c, const float* beta, float* y, float* acc) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) code_quad<T, 4, Signs>(x + r * c, c, beta, y + r * c, acc);
  switch (rows - r) {
    case 1: return code_quad<T, 1, Signs>(x + r * c, c, beta, y + r * c, acc);
    case 2: return code_quad<T, 2, Signs>(x + r * c, c, beta, y + r * c, acc);
    case 3: return code_quad<T, 3, Signs>(x + r * c, c, beta, y + r * c, acc);
    default: return;
  }
}

template <class T>
void codes_typed(const bdt_shape& d, const bdt_codes& a) {
  const T* x = (const T*)a.x;
  const int64_t c = d.c;
  const Split split(d);
  const int64_t units = d.n * split.parts;
  std::vector<double> totals((size_t)(units * c)), distances((size_t)units);
  std::vector<float> steps((size_t)d.n, 1.0f);
#pragma omp parallel num_threads(threads_for(d))
  {
    std::vector<float> acc((size_t)c);
#pragma omp for schedule(static)
    for (int64_t u = 0; u < units; ++u) {
      const int64_t n = u / split.parts, part = u % split.parts;
      double* total = totals.data() + u * c;
      for (int64_t span = split.first(part); span < split.first(part + 1); ++span) {
        const int64_t p = span * kSpan;
        std::fill(acc.begin(), acc.end(), 0.0f);
        sum_span(x + (n * d.s + p) * c, std::min(kSpan, d.s - p), c, acc.data());
        for (int64_t i = 0; i < c; ++i) total[i] += (double)acc[i];
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < d.n; ++n) {
      double* total = totals.data() + n * split.parts * c;
      for (int64_t part = 1; part < split.parts; ++part)
        for (int64_t i = 0; i < c; ++i) total[i] += total[part * c + i];
      for (int64_t i = 0; i < c; ++i) {
        const float mean = (float)(total[i] / (double)d.s);
        a.beta[n * c + i] = rounded<T>(a.k[i] * mean + a.b[i]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t u = 0; u < units; ++u) {
      const int64_t n = u / split.parts, part = u % split.parts;
      const float* beta = a.beta + n * c;
      double distance = 0;
      for (int64_t span = split.first(part); span < split.first(part + 1); ++span) {
        const int64_t p = span * kSpan, rows = std::min(kSpan, d.s - p), at = (n * d.s + p) * c;
        if (a.a == nullptr) {
          if (a.planes == 1)
            for (int64_t r = 0; r < rows; ++r) sign_row(x + at + r * c, c, beta, a.y + at + r * c);
          continue;
        }
        std::fill(acc.begin(), acc.end(), 0.0f);
        if (a.planes == 1)
          code_span<T, true>(x + at, rows, c, beta, a.y + at, acc.data());
        else
          code_span<T, false>(x + at, rows, c, beta, a.y + at, acc.data());
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < c; ++i) sum += (double)acc[i];
        distance += sum;
      }
      distances[u] = distance;
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < d.n; ++n) {
      if (a.a == nullptr) continue;
      double total = 0;
      for (int64_t part = 0; part < split.parts; ++part) total += distances[n * split.parts + part];
      const double mean = total / ((double)d.s * (double)c);
      if (a.planes == 1) {
        a.alpha[n] = (float)std::exp((double)a.a[0] * (mean - 1.0));
      } else {
        steps[(size_t)n] = (float)(kBestStep * std::exp((double)a.a[0]) * mean);
        a.alpha[n] = steps[(size_t)n] / 2;
      }
    }
    if (a.planes == 2) {
#pragma omp for schedule(static)
      for (int64_t u = 0; u < units; ++u) {
        const int64_t n = u / split.parts, part = u % split.parts, end = std::min(d.s, split.first(part + 1) * kSpan);
        for (int64_t p = split.first(part) * kSpan; p < end; ++p)
          level_row(x + (n * d.s + p) * c, c, a.beta + n * c, steps[(size_t)n], a.y + (n * d.s + p) * c);
      }
    }
  }
}

void codes(const bdt_shape& d, const bdt_codes& a) { d.half ? codes_typed<uint16_t>(d, a) : codes_typed<float>(d, a); }

template <class T, bool EXTRA, bool SLOPE, bool POST>
inline void finish_row(int64_t c, const float* dot, const float* factor, const float* bias, const float* extra,
                       const float* slope, const float* post, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    float v = dot[i] * factor[i] + bias[i];
    if (EXTRA) v += extra[i];
    if (SLOPE) v = v > 0 ? v : v * slope[i];
    if (POST) v += post[i];
    store(y + i, v);
  }
}

template <class T, bool EXTRA, bool SLOPE, bool POST>
void finish_chosen(const bdt_shape& d, const bdt_finish& a) {
  const int64_t c = d.c;
  const Split split(d);
#pragma omp parallel num_threads(threads_for(d))
  {
    std::vector<float> factor((size_t)c);
#pragma omp for schedule(static)
    for (int64_t u = 0; u < d.n * split.parts; ++u) {
      const int64_t n = u / split.parts, part = u % split.parts;
      const float half = a.half != nullptr ? a.half[n] : 1.0f;
      for (int64_t i = 0; i < c; ++i) factor[i] = a.scale[i] * half;
      const int64_t end = std::min(d.s, split.first(part + 1) * kSpan);
      for (int64_t p = split.first(part) * kSpan; p < end; ++p) {
        const int64_t at = (n * d.s + p) * c;
        finish_row<T, EXTRA, SLOPE, POST>(c, a.dot + at, factor.data(), a.bias, EXTRA ? a.extra + at : nullptr, a.slope, a.post,
                                          (T*)a.y + at);
      }
    }
  }
}

template <class T, bool EXTRA>
void finish_typed(const bdt_shape& d, const bdt_finish& a) {
  if (a.slope == nullptr) {
    a.post == nullptr ? finish_chosen<T, EXTRA, false, false>(d, a) : finish_chosen<T, EXTRA, false, true>(d, a);
  } else {
    a.post == nullptr ? finish_chosen<T, EXTRA, true, false>(d, a) : finish_chosen<T, EXTRA, true, true>(d, a);
  }
}

void finish(const bdt_shape& d, const bdt_finish& a) {
  if (d.half) {
    a.extra != nullptr ? finish_typed<uint16_t, true>(d, a) : finish_typed<uint16_t, false>(d, a);
  } else {
    a.extra != nullptr ? finish_typed<float, true>(d, a) : finish_typed<float, false>(d, a);
  }
}

void signs(int64_t rows, int64_t columns, int threads, const float* w, float* scale, float* y) {
#pragma omp parallel for schedule(static) num_threads(rows* columns > kSerial ? threads : 1)
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = w + r * columns;
    float* to = y + r * columns;
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < columns; ++i) {
      total += (double)std::fabs(from[i]);
      to[i] = from[i] >= 0 ? 1.0f : -1.0f;
    }
    scale[r] = (float)(total / (double)columns);
  }
}

const bdt::Evaluation table = {codes, finish, signs};

}  // namespace

namespace bdt {
const Evaluation* BDT_EVALUATION() { return &table; }
}  // namespace bdt
