// The last pass: popcounts of one output row at a time, and what is done with them.
#include <algorithm>

#include "layer.h"
#include "scratch.h"

namespace bd {

thread_local Buffer row_buffer;

Layer::Scratch Layer::scratch() const {
  Scratch s;
  size_t at = 0;
  auto take = [&at](int64_t bytes) {
    const size_t start = at;
    at += (size_t)round_up(bytes, 64);
    return start;
  };
  const size_t buffer = take(buffered_ ? row_pixels_ * a_.cout * 4 + 64 : 0);
  const size_t early = take(early_ ? row_pixels_ * a_.cout * 4 + 64 : 0);
  const size_t windows = take(ones_ != nullptr ? row_pixels_ * a_.groups * 4 : 0);
  const size_t pixel = take(cin_padded_ * 4), source = take(row_pixels_ * (int64_t)sizeof(void*));
  const size_t kvalid = take((row_pixels_ + kLanes) * 4);
  const int64_t bypass_pixels = pointwise_ ? row_pixels_ : a_.w * (a_.bypass == BD_BYPASS_AVERAGE ? a_.kh : 1);
  const size_t room_at = take(a_.bypass == BD_BYPASS_NONE ? 0 : room(bypass_pixels));
  char* memory = row_buffer.get(at);
  s.buffer = buffered_ ? reinterpret_cast<float*>(memory + buffer) : nullptr;
  s.early = early_ ? reinterpret_cast<float*>(memory + early) : nullptr;
  s.windows = ones_ != nullptr ? reinterpret_cast<float*>(memory + windows) : nullptr;
  s.pixel = reinterpret_cast<float*>(memory + pixel);
  s.source = reinterpret_cast<const void**>(memory + source);
  s.kvalid = reinterpret_cast<int32_t*>(memory + kvalid);
  s.room = memory + room_at;
  return s;
}

// Output rows begin..end-1, counted through the samples from `first` on.
void Layer::convolve(int64_t first, int64_t begin, int64_t end, bool backwards) {
  Scratch s = scratch();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = backwards ? begin + end - 1 - i : i;
    look_ahead(first, backwards ? r - 1 : r + 1, s);
    if (a_.depthwise) {
      depthwise_row(first + r / rows_, r % rows_, s);
    } else {
      row(first + r / rows_, r % rows_, s);
    }
  }
}

// A block reads and writes short pieces of many pixels, which no processor foresees; the row as a whole is a few stretches.
void Layer::look_ahead(int64_t first, int64_t row, Scratch& s) const {
  s.x_ahead = s.y_ahead = {};
  const int64_t sample = first + row / rows_, r = row % rows_;
  if (row < 0 || sample >= a_.n || a_.dots != nullptr) return;
  const int64_t place = r * row_pixels_, pixels = std::min(row_pixels_, a_.oh * a_.ow - place);
  s.y_ahead.set(static_cast<const char*>(a_.y) + (sample * a_.oh * a_.ow + place) * a_.cout * element_,
                pixels * a_.cout * element_, blocks_);
  if (a_.bypass == BD_BYPASS_NONE || inputs_ != nullptr) return;
  int64_t begin, end;
  bypass_rows(r, &begin, &end);
  if (begin < end)
    s.x_ahead.set(x_ + (sample * a_.h * a_.w + begin) * a_.cin * element_, (end - begin) * a_.cin * element_, blocks_);
}

void Layer::fill(Epilogue& e, int64_t sample, int64_t first_channel, int channels) const {
  e.dtype = a_.dtype;
  e.scale = scale_ + (sample - base_) * cout_padded_ + first_channel;
  e.bias = a_.bias + first_channel;
  e.offset = a_.offset && !a_.depthwise ? a_.offset + first_channel : nullptr;
  e.window = nullptr;
  e.window_step = 0;
  e.rise = a_.rise ? a_.rise + first_channel : nullptr;
  e.slope = a_.slope ? a_.slope + first_channel : nullptr;
  e.clamp = a_.clamp;
  e.early = nullptr;
  e.last = a_.bypass_last != 0;
  e.post = a_.post ? a_.post + first_channel : nullptr;
  e.source_channel = first_channel;
  e.source_wrap = a_.cin;
  e.source_sum = a_.cout < a_.cin ? a_.cin / a_.cout : 1;
  e.source_stride = a_.cout;
  e.buffer_step = a_.cout;
  e.channels = channels;
}

void Layer::write_dots(const int32_t* counts, int64_t count_step, int pixels, int channels, const int32_t* kvalid,
                       int kvalid_step, int64_t first, int64_t step) const {
  for (int p = 0; p < pixels; ++p)
    for (int c = 0; c < channels; ++c)
      a_.dots[first + p * step + c] = kvalid[p * kvalid_step] - 2 * counts[p * count_step + c];
}

// Asks for what the block's last step reads and writes while its popcounts are still being made.
void Layer::fetch(const Scratch& s, int64_t sample, int64_t channel, int channels, int64_t source, int64_t place, int64_t step,
                  int block) const {
  const int64_t bytes = channels * element_;
  const char* y = static_cast<const char*>(a_.y) + ((sample * a_.oh * a_.ow + place) * a_.cout + channel) * element_;
  for (int p = 0; p < block; ++p, y += step * a_.cout * element_)
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(y + line, 1);
  if (!direct_) return;
  const int64_t members = a_.cout < a_.cin ? a_.cin / a_.cout : 1;
  for (int64_t member = 0; member < members; ++member) {
    const int64_t from = (channel + member * a_.cout) % a_.cin * element_;
    for (int p = 0; p < block; ++p)
      for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(static_cast<const char*>(s.source[source + p]) + from + line);
  }
}

void Layer::row(int64_t sample, int64_t r, Scratch& s) {
  const int64_t place = pointwise_ ? r * row_pixels_ : r * a_.ow;
  const int64_t pixels = pointwise_ ? std::min(row_pixels_, a_.oh * a_.ow - place) : a_.ow;
  if (pointwise_) {
    s.rows.assign(1, {0, 0});
  } else {
    taps_at({a_.h, a_.oh, a_.kh, a_.sh, a_.dh, a_.pad_top, a_.transposed != 0}, r, s.rows);
  }
  prepare_bypass(sample, r, pixels, s);
  if (s.windows != nullptr) sum_windows(sample, r, s);
  const int mixed = a_.planes == 2 ? mixed_[sample - base_] : 0;
  const int64_t step = mixed == 3 ? std::min(inner_.max_pixels2, block_pixels_) : block_pixels_;
  int32_t fixed[kMaxChannels];
  const int64_t taps = (int64_t)a_.kh * a_.kw, tile_step = taps * words_ * stride_;
  const uint32_t* bits = bits_ + (sample - base_) * a_.h * a_.w * row_words_ + (pointwise_ ? place * row_words_ : 0);
  int32_t counts[kMaxPixels * kMaxChannels];
  constexpr int64_t count_step = kMaxChannels;
  char* y = static_cast<char*>(a_.y);
  int64_t before = 0;
  for (const Run& run : runs_) {
    const int64_t count = std::min(run.count, pointwise_ ? pixels : run.count);
    s.segments.clear();
    for (const Tap& row : s.rows)
      for (const Tap& column : run.taps) {
        const int64_t a = ((int64_t)row.at * a_.w + column.at) * row_words_;
        const int64_t w = ((int64_t)row.k * a_.kw + column.k) * words_ * stride_;
        if (!s.segments.empty()) {
          Segment& last = s.segments.back();
          // Neighbouring taps of one row are one stretch of words.
          if (a_.groups == 1 && tap_bytes_ == words_ * 4 && last.a + last.n == a && last.w + last.n * stride_ == w) {
            last.n += words_;
            last.bytes += tap_bytes_;
            continue;
          }
        }
        s.segments.push_back({a, w, words_, tap_bytes_});
      }
    const int32_t kvalid = (int32_t)(s.rows.size() * run.taps.size() * in_group_) * unit_;
    for (int64_t g = 0; g < a_.groups; ++g)
      for (int64_t t = 0; t < tiles_; t += inner_.max_tiles) {
        const int64_t channel = g * out_group_ + t * lanes_;
        const int channels = (int)std::min<int64_t>(inner_.max_tiles * lanes_, out_group_ - t * lanes_);
        const uint32_t* w = weights_ + (g * tiles_ + t) * tile_step;
        Epilogue e;
        fill(e, sample, channel, channels);
        e.kvalid = &kvalid;
        e.kvalid_step = 0;
        e.y_step = run.step * a_.cout;
        e.buffer_step = run.step * a_.cout;
        if (a_.planes == 2 && mixed != 3) fixed_counts(bits + g * words_, s, w, tile_step, channels, mixed, fixed);
        for (int64_t j = 0; j < count; j += step) {
          const int block = (int)std::min<int64_t>(step, count - j);
          s.x_ahead.step<0>();
          s.y_ahead.step<1>();
          if (a_.dots == nullptr) fetch(s, sample, channel, channels, before + j, place + run.start + j * run.step, run.step, block);
          const uint32_t* from = bits + g * words_ + j * run.in_step * row_words_;
          if (a_.planes == 2) {
            popcounts(from, run.in_step * row_words_, s, w, tile_step, block, channels, mixed, fixed, counts);
          } else {
            inner_.gemm(from, run.in_step * row_words_, s.segments.data(), (int64_t)s.segments.size(), w, tile_step, block,
                        channels, counts, count_step);
          }
          const int64_t ow = run.start + j * run.step;
          const int64_t out = (sample * a_.oh * a_.ow + place + ow) * a_.cout + channel;
          if (a_.dots) {
            write_dots(counts, count_step, block, channels, &kvalid, 0, out, e.y_step);
            continue;
          }
          e.source = direct_ ? s.source + before + j : nullptr;
          e.buffer = buffered_ ? s.buffer + ow * a_.cout + channel : nullptr;
          e.early = early_ ? s.early + ow * a_.cout + channel : nullptr;
          if (s.windows != nullptr) {
            e.window = s.windows + ow * a_.groups + g;
            e.window_step = run.step * a_.groups;
          }
          e.y = y + out * element_;
          inner_.finish(counts, count_step, block, e);
        }
      }
    before += count;
  }
}

void Layer::depthwise_row(int64_t sample, int64_t r, Scratch& s) {
  taps_at({a_.h, a_.oh, a_.kh, a_.sh, a_.dh, a_.pad_top, false}, r, s.rows);
  prepare_bypass(sample, r, a_.ow, s);
  for (int64_t ow = 0; ow < a_.ow; ++ow) s.kvalid[ow] = (int32_t)s.rows.size() * column_taps_[ow] * unit_;
  const size_t n = s.rows.size() * (size_t)a_.kw;
  s.taps.resize(n);
  s.valid.resize(n);
  s.weights.resize(n);
  if (a_.planes == 2) s.taps2.resize(n);
  const uint32_t* bits = bits_ + (sample - base_) * a_.h * words_ * plane_;
  int32_t counts[kLanes * 32];
  char* y = static_cast<char*>(a_.y);
  // A channel's window is a convolution with weights of +1.
  const float half = half_[sample - base_], middle = middle_[sample - base_];
  float* inside = early_ ? s.early : s.buffer;
  if (a_.offset != nullptr) s.ones.assign(n, 0xffffffffu);
  for (int64_t word = 0; word < words_; ++word) {
    const int channels = (int)std::min<int64_t>(32, a_.cin - word * 32);
    Epilogue e;
    fill(e, sample, word * 32, channels);
    e.kvalid_step = 1;
    e.y_step = a_.cout;
    size_t i = 0;
    for (const Tap& row : s.rows)
      for (int32_t k = 0; k < a_.kw; ++k, ++i) {
        const int64_t shift = (int64_t)k * a_.dw;
        const int64_t at = shift % a_.sw * phase_length_ + shift / a_.sw;
        s.taps[i] = bits + ((int64_t)row.at * words_ + word) * plane_ + at;
        if (a_.planes == 2) s.taps2[i] = s.taps[i] + second_;
        s.valid[i] = valid_.data() + at;
        s.weights[i] = a_.tiles[((int64_t)row.k * a_.kw + k) * words_ + word];
      }
    for (int64_t ow = 0; ow < a_.ow; ow += kLanes) {
      const int block = (int)std::min<int64_t>(kLanes, a_.ow - ow);
      s.x_ahead.step<0>();
      s.y_ahead.step<1>();
      if (a_.offset != nullptr && a_.dots == nullptr) {
        depthwise_counts(s, s.ones, !inside_[ow / kLanes], counts);
        for (int p = 0; p < block; ++p) {
          float* to = inside + (ow + p) * a_.cout + word * 32;
          for (int c = 0; c < channels; ++c) {
            float window = (float)(s.kvalid[ow + p] - 2 * counts[p * 32 + c]) * half;
            if (a_.levels) window = window + (float)(s.kvalid[ow + p] / unit_) * middle;
            to[c] = to[c] + window * a_.offset[word * 32 + c];
          }
        }
      }
      depthwise_counts(s, s.weights, !inside_[ow / kLanes], counts);
      for (size_t t = 0; t < n; ++t) {
        s.taps[t] += kLanes;
        if (a_.planes == 2) s.taps2[t] += kLanes;
        s.valid[t] += kLanes;
      }
      const int64_t out = (sample * a_.oh * a_.ow + r * a_.ow + ow) * a_.cout + word * 32;
      if (a_.dots) {
        write_dots(counts, 32, block, channels, s.kvalid + ow, 1, out, a_.cout);
        continue;
      }
      e.kvalid = s.kvalid + ow;
      e.source = direct_ ? s.source + ow : nullptr;
      e.buffer = buffered_ ? s.buffer + ow * a_.cout + word * 32 : nullptr;
      e.early = early_ ? s.early + ow * a_.cout + word * 32 : nullptr;
      e.y = y + out * element_;
      inner_.finish(counts, 32, block, e);
    }
  }
}

}  // namespace bd
