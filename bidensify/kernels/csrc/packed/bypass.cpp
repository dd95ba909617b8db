// What is added to a row beside its dot products: the bypass, a residual, the middle of lopsided activation values, sums of
// windows for the weights' offset.
#include <string.h>

#include <algorithm>

#include "layer.h"
#include "scratch.h"

namespace bd {

// The input pixels that the bypass of row r reads are of one stretch: first..last-1.
void Layer::bypass_rows(int64_t r, int64_t* first, int64_t* last) const {
  if (pointwise_) {
    *first = r * row_pixels_;
    *last = std::min(*first + row_pixels_, a_.h * a_.w);
    return;
  }
  const bool average = a_.bypass == BD_BYPASS_AVERAGE;
  const int64_t top = average ? r * a_.sh - a_.bypass_pad_h : a_.rows ? a_.rows[r] : r;
  *first = std::max<int64_t>(0, top) * a_.w;
  *last = (average ? std::min<int64_t>(a_.h, top + a_.kh) : top + 1) * a_.w;
}

void Layer::prepare_bypass(int64_t sample, int64_t r, int64_t pixels, Scratch& s) {
  int64_t first, last;
  bypass_rows(r, &first, &last);
  const char* x = nullptr;
  if (a_.bypass != BD_BYPASS_NONE && first < last) x = this->pixels(sample, first, last - first, s.room);
  auto pixel = [&](int64_t p) { return x + (p - first) * a_.cin * element_; };
  auto source = [&](int64_t ow) { return pixel(first + (!pointwise_ && a_.cols ? a_.cols[ow] : ow)); };
  const int64_t above = first / a_.w, below = last / a_.w;
  if (direct_) {
    int64_t i = 0;
    for (const Run& run : runs_)
      for (int64_t j = 0; j < run.count && i < pixels; ++j, ++i) s.source[i] = source(run.start + j * run.step);
  }
  if (early_) {
    memset(s.early, 0, (size_t)(pixels * a_.cout) * 4);
    if (a_.levels) add_middle(sample, r, s, s.early);
  }
  if (!buffered_) return;
  if (direct_ || a_.bypass == BD_BYPASS_NONE) {
    memset(s.buffer, 0, (size_t)(pixels * a_.cout) * 4);
  } else {
    for (int64_t ow = 0; ow < pixels; ++ow) {
      float* out = s.buffer + ow * a_.cout;
      if (a_.bypass == BD_BYPASS_INDEX) {
        inner_.fuse(source(ow), a_.dtype, a_.cin, a_.cout, out);
        continue;
      }
      s.window.clear();
      const int64_t left = ow * a_.sw - a_.bypass_pad_w;
      for (int64_t ih = above; ih < below; ++ih)
        for (int64_t iw = std::max<int64_t>(0, left); iw < std::min<int64_t>(a_.w, left + a_.kw); ++iw)
          s.window.push_back(pixel(ih * a_.w + iw));
      if (a_.cin == a_.cout) {
        inner_.average(s.window.data(), (int)s.window.size(), a_.dtype, a_.cin, out);
      } else {
        inner_.average(s.window.data(), (int)s.window.size(), a_.dtype, a_.cin, s.pixel);
        inner_.fuse(s.pixel, BD_FLOAT32, a_.cin, a_.cout, out);
      }
    }
  }
  if (a_.residual) {
    const char* from =
        static_cast<const char*>(a_.residual) + ((sample * a_.oh * a_.ow + r * row_pixels_) * a_.cout) * element_;
    inner_.accumulate(from, a_.dtype, nullptr, pixels * a_.cout, s.buffer);
  }
  if (a_.levels && !early_) add_middle(sample, r, s, s.buffer);
}

// Values low, high = middle -+ half: the middle meets the sum of the weights under the valid taps.
void Layer::add_middle(int64_t sample, int64_t r, Scratch& s, float* to) {
  const float middle = middle_[sample - base_];
  if (middle == 0) return;
  const int64_t pixels = pointwise_ ? std::min(row_pixels_, a_.oh * a_.ow - r * row_pixels_) : a_.ow;
  s.sums.resize(a_.cout);
  for (const Run& run : runs_) {
    std::fill(s.sums.begin(), s.sums.end(), 0.0f);
    for (const Tap& row : s.rows)
      for (const Tap& column : run.taps) {
        const int32_t* sums = tap_sums_.data() + ((int64_t)row.k * a_.kw + column.k) * a_.cout;
        for (int64_t c = 0; c < a_.cout; ++c) s.sums[c] += (float)sums[c];
      }
    for (int64_t c = 0; c < a_.cout; ++c) s.sums[c] *= middle;
    for (int64_t j = 0; j < run.count; ++j) {
      const int64_t ow = run.start + j * run.step;
      if (ow < pixels) inner_.accumulate(s.sums.data(), BD_FLOAT32, a_.scale, a_.cout, to + ow * a_.cout);
    }
  }
}

// Values middle +- half: their sum over each window and group is half times the sum of the signs, plus middle times the taps.
void Layer::sum_windows(int64_t sample, int64_t r, Scratch& s) {
  const int64_t start = sample - base_;
  const float half = half_[start], middle = middle_[start];
  const int64_t pixels = pointwise_ ? std::min(row_pixels_, a_.oh * a_.ow - r * row_pixels_) : a_.ow;
  const int32_t* ones = ones_ + (start * a_.h * a_.w + (pointwise_ ? r * row_pixels_ : 0)) * a_.groups;
  for (const Run& run : runs_) {
    const int32_t taps = (int32_t)(s.rows.size() * run.taps.size() * in_group_);
    for (int64_t j = 0; j < run.count; ++j) {
      const int64_t ow = run.start + j * run.step;
      if (ow >= pixels) break;
      for (int64_t g = 0; g < a_.groups; ++g) {
        int32_t found = 0;
        for (const Tap& row : s.rows)
          for (const Tap& column : run.taps)
            found += ones[((int64_t)row.at * a_.w + column.at + j * run.in_step) * a_.groups + g];
        float window = (float)(2 * found - taps * unit_) * half;
        if (a_.levels) window = window + (float)taps * middle;
        s.windows[ow * a_.groups + g] = window;
      }
    }
  }
}

}  // namespace bd
