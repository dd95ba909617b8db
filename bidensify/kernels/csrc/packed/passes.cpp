// The passes before the convolution: means and thresholds, bits and distances, scales.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "layer.h"
#include "scratch.h"

namespace bd {
namespace {

// The best step of four levels of a Gaussian, in its mean distances.
constexpr double kBestStep = 1.248;

float round_to(float v, int dtype) {
  if (dtype == BD_FLOAT32) return v;
  uint32_t u;
  memcpy(&u, &v, sizeof u);
  if ((u & 0x7fffffffu) <= 0x7f800000u) u += 0x7fffu + ((u >> 16) & 1u);
  u &= 0xffff0000u;
  memcpy(&v, &u, sizeof v);
  return v;
}

}  // namespace

void Layer::sum_part(int64_t first, int64_t u) {
  const int64_t sample = first + u / parts_, part = u % parts_;
  double* total = partial_ + u * a_.cin;
  char* memory = row_buffer.get((size_t)(cin_padded_ * 4 + room(kBlock)));
  float* acc = reinterpret_cast<float*>(memory);
  for (int64_t c = 0; c < a_.cin; ++c) total[c] = 0;
  const int64_t end = part_start(part + 1);
  for (int64_t p = part_start(part); p < end; p += kBlock) {
    memset(acc, 0, (size_t)a_.cin * 4);
    const int64_t n = std::min(kBlock, end - p);
    inner_.sum(pixels(sample, p, n, memory + cin_padded_ * 4), a_.dtype, n, a_.cin, acc);
    for (int64_t c = 0; c < a_.cin; ++c) total[c] += acc[c];
  }
}

// Pixels first..first+count-1 of a sample, side by side: where they lie, or gathered in `room`.
const char* Layer::pixels(int64_t sample, int64_t first, int64_t count, char* room) const {
  if (inputs_ == nullptr) return x_ + (sample * a_.h * a_.w + first) * a_.cin * element_;
  const int64_t step = a_.cin * element_;
  char* start = room;
  for (int32_t i = 0; i < input_count_; ++i) {
    const bd_part& part = inputs_[i];
    const int64_t bytes = part.channels * element_, width = a_.w / part.up_w, height = a_.h / part.up_h;
    const char* x = static_cast<const char*>(part.x) + sample * height * width * bytes;
    char* to = start;
    for (int64_t p = first; p < first + count;) {
      const int64_t row = p / a_.w, end = std::min(first + count, (row + 1) * a_.w);
      const char* line = x + row / part.up_h * width * bytes;
      for (int64_t column = p - row * a_.w; p < end; ++p, ++column, to += step)
        memcpy(to, line + column / part.up_w * bytes, (size_t)bytes);
    }
    start += bytes;
  }
  return room;
}

void Layer::threshold(int64_t first, int64_t n) {
  const double pixels = (double)(a_.h * a_.w);
  for (int64_t s = 0; s < n; ++s) {
    float* beta = beta_ + s * cin_padded_;
    double* total = partial_ + s * parts_ * a_.cin;
    if (a_.k)
      for (int64_t part = 1; part < parts_; ++part)
        for (int64_t c = 0; c < a_.cin; ++c) total[c] += total[part * a_.cin + c];
    for (int64_t c = 0; c < a_.cin; ++c) {
      float v = a_.thresholds ? a_.thresholds[(first + s) * a_.cin + c] : 0.0f;
      if (a_.k) v = a_.k[c] * (float)(total[c] / pixels);
      if (a_.b) v = v + a_.b[c];
      beta[c] = round_to(v, a_.dtype);
    }
    for (int64_t c = a_.cin; c < cin_padded_; ++c) beta[c] = 0;
  }
}

void Layer::place_pixels(int64_t p, int64_t n, int64_t* places) const {
  for (int64_t i = 0, h = p / a_.w, w = p % a_.w; i < n; ++i) {
    places[i] = h * words_ * plane_ + column_place_[w];
    if (++w == a_.w) w = 0, ++h;
  }
}

void Layer::pack_part(int64_t sample, int64_t part) {
  const int64_t s = sample - base_;
  const float* beta = beta_ + s * cin_padded_;
  const int64_t end = part_start(part + 1);
  char* memory = row_buffer.get((size_t)(cin_padded_ * 4 + room(kBlock)));
  float* acc = distance_ ? reinterpret_cast<float*>(memory) : nullptr;
  double lanes[kLanes] = {};
  for (int64_t p = part_start(part); p < end; p += kBlock) {
    const int64_t n = std::min(kBlock, end - p);
    const char* x = pixels(sample, p, n, memory + cin_padded_ * 4);
    if (a_.depthwise) {
      int64_t places[kBlock];
      place_pixels(p, n, places);
      inner_.pack(x, a_.dtype, n, a_.cin, a_.cin, beta, bits_ + s * a_.h * words_ * plane_, places, 0, plane_,
                  acc, lanes);
      continue;
    }
    uint32_t* out = bits_ + (s * a_.h * a_.w + p) * row_words_;
    for (int64_t g = 0; g < a_.groups; ++g)
      inner_.pack(x + g * in_group_ * element_, a_.dtype, n, a_.cin, in_group_, beta + g * in_group_,
                  out + g * words_, nullptr, row_words_, 1, acc, lanes);
    if (ones_ != nullptr) {
      int32_t* ones = ones_ + (s * a_.h * a_.w + p) * a_.groups;
      for (int64_t i = 0; i < n * a_.groups; ++i) {
        int32_t found = 0;
        for (int64_t word = 0; word < words_; ++word) found += __builtin_popcount(out[i * words_ + word]);
        ones[i] = found;
      }
    }
  }
  double distance = 0;
  for (double lane : lanes) distance += lane;
  distances_[s * parts_ + part] = distance;
}

void Layer::scale(int64_t first, int64_t n) {
  for (int64_t s = 0; s < n; ++s) {
    float low = -1, high = 1;
    if (a_.levels) {
      const float* pair = a_.levels + (a_.per_sample_levels ? 2 * (first + s) : 0);
      low = pair[0];
      high = pair[1];
    } else if (a_.a) {
      double total = 0;
      for (int64_t part = 0; part < parts_; ++part) total += distances_[s * parts_ + part];
      const double mean = total / ((double)(a_.h * a_.w) * (double)a_.cin);
      high = a_.planes == 2 ? (float)(kBestStep * exp((double)a_.a[0]) * mean) : (float)exp((double)a_.a[0] * (mean - 1.0));
      low = -high;
    }
    float half = (high - low) / 2;
    middle_[s] = (high + low) / 2;
    step_[s] = half;
    // Two planes count in units of half a step.
    if (a_.planes == 2) half = half / 2;
    half_[s] = half;
    float* scale = scale_ + s * cout_padded_;
    for (int64_t c = 0; c < a_.cout; ++c) scale[c] = a_.scale[c] * half;
  }
}

}  // namespace bd
