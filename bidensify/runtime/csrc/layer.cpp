#include "layer.h"

#include <string.h>

#include <algorithm>

#include "phases.h"
#include "scratch.h"

namespace bd {
namespace {

// Samples are taken together until their input fills about this much of the cache.
constexpr int64_t kGroupBytes = 1 << 20;
constexpr int64_t kPointwiseRow = 64;
// What one unit of the first passes reads: small beside a core's second-level cache, where the next pass looks for it.
constexpr int64_t kPartBytes = 128 << 10;
constexpr int64_t kMostParts = 256;
constexpr int64_t kArrangeUnits = 16;

// Of the thread that called: words, thresholds, scales, for the length of one call.
thread_local Buffer shared_buffer;

}  // namespace

thread_local Buffer row_buffer;

Layer::Layer(const bd_conv_args& args, const Inner& inner, const bd_part* parts, int32_t part_count)
    : a_(args), inner_(inner), inputs_(parts), input_count_(part_count) {
  x_ = static_cast<const char*>(a_.x);
  element_ = a_.dtype == BD_FLOAT32 ? 4 : 2;
  in_group_ = a_.cin / a_.groups;
  out_group_ = a_.cout / a_.groups;
  lanes_ = inner_.lanes;
  stride_ = inner_.stride;
  tiles_ = (out_group_ + lanes_ - 1) / lanes_;
  weights_ = a_.tiles;
  words_ = a_.depthwise ? (a_.cin + 31) / 32 : (in_group_ + 31) / 32;
  row_words_ = words_ * (a_.depthwise ? 1 : a_.groups);
  cin_padded_ = round_up(a_.cin, kLanes) + kLanes;
  cout_padded_ = round_up(a_.cout, kLanes) + kLanes;
  distance_ = a_.a != nullptr;

  pointwise_ = !a_.depthwise && !a_.transposed && a_.kh == 1 && a_.kw == 1 && a_.sh == 1 && a_.sw == 1 && a_.pad_top == 0 &&
               a_.pad_left == 0 && a_.oh == a_.h && a_.ow == a_.w && a_.rows == nullptr && a_.bypass != BD_BYPASS_AVERAGE;
  const int64_t pixels = a_.oh * a_.ow;
  row_pixels_ = pointwise_ ? std::min(kPointwiseRow, pixels) : a_.ow;
  rows_ = pointwise_ ? (pixels + row_pixels_ - 1) / row_pixels_ : a_.oh;
  if (pointwise_) {
    runs_.push_back({0, 1, row_pixels_, 1, {{0, 0}}});
  } else {
    runs_ = make_runs({a_.w, a_.ow, a_.kw, a_.sw, a_.dw, a_.pad_left, a_.transposed != 0});
  }

  const bool middle = a_.levels != nullptr;
  const bool whole_up = a_.cout == a_.cin || (a_.cout > a_.cin && a_.cout % a_.cin == 0 && a_.cin % kLanes == 0 &&
                                              (a_.groups == 1 || a_.depthwise || out_group_ % kMaxChannels == 0));
  const bool whole_down = a_.cout < a_.cin && a_.cin % a_.cout == 0;
  // What is added before the activation is added up first: several things meet in the buffer.
  const bool more = a_.residual != nullptr || middle;
  direct_ = a_.bypass == BD_BYPASS_INDEX && (whole_up || whole_down) && !more;
  buffered_ = (a_.bypass != BD_BYPASS_NONE && !direct_) || more;

  // Parts are made of whole blocks.
  const int64_t in_pixels = a_.h * a_.w, wanted = in_pixels * a_.cin * element_ / kPartBytes;
  parts_ = std::max<int64_t>(1, std::min(std::min(std::max<int64_t>(wanted, 16), kMostParts), in_pixels / kBlock));

  plane_ = phase_length_ = 0;
  if (a_.depthwise) {
    column_taps_.resize(a_.ow);
    for (const Run& run : runs_)
      for (int64_t i = 0; i < run.count; ++i) column_taps_[run.start + i * run.step] = (int32_t)run.taps.size();
    // Column iw lies at (iw + pad) in padded coordinates; output ow's tap kw is at ow * sw + kw * dw there.
    const int64_t reach = std::max(a_.w - 1 + a_.pad_left, (a_.ow - 1) * a_.sw + (int64_t)(a_.kw - 1) * a_.dw);
    phase_length_ = reach / a_.sw + 1 + kLanes;
    plane_ = phase_length_ * a_.sw;
    valid_.assign(plane_, 0);
    column_place_.resize(a_.w);
    for (int64_t iw = 0; iw < a_.w; ++iw) {
      const int64_t at = iw + a_.pad_left;
      column_place_[iw] = at % a_.sw * phase_length_ + at / a_.sw;
      valid_[column_place_[iw]] = 0xffffffffu;
    }
    inside_.assign((a_.ow + kLanes - 1) / kLanes, 1);
    for (int64_t ow = 0; ow < (int64_t)inside_.size() * kLanes; ++ow)
      if (ow >= a_.ow || column_taps_[ow] != a_.kw) inside_[ow / kLanes] = 0;
  }
  if (middle) {
    // Sum of the signs per tap and output channel.
    const int64_t taps = (int64_t)a_.kh * a_.kw;
    const int64_t stored = (out_group_ + kLanes - 1) / kLanes;
    tap_sums_.assign(taps * a_.cout, 0);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t o = 0; o < a_.cout; ++o) {
        int64_t ones = 0;
        if (a_.depthwise) {
          ones = a_.tiles[tap * words_ + o / 32] >> (o % 32) & 1u;
        } else {
          const int64_t g = o / out_group_, at = o % out_group_;
          const uint32_t* w = a_.tiles + (((g * stored + at / kLanes) * taps + tap) * words_) * kLanes + at % kLanes;
          for (int64_t t = 0; t < words_; ++t) ones += __builtin_popcount(w[t * kLanes]);
        }
        tap_sums_[tap * a_.cout + o] = (int32_t)(2 * ones - in_group_);
      }
  }
}

int64_t Layer::part_start(int64_t part) const {
  const int64_t pixels = a_.h * a_.w;
  return std::min(pixels, (pixels + kBlock - 1) / kBlock * part / parts_ * kBlock);
}

void Layer::run() {
  const int64_t sample_bytes = a_.h * a_.w * a_.cin * element_;
  const int64_t group = std::max<int64_t>(1, std::min(a_.n, kGroupBytes / (sample_bytes + 1)));
  allocate(group);
  // The passes over x go to and fro: each begins with what the one before read last. So do layers: the end of this one's
  // last pass is what the next layer reads first.
  static thread_local bool flip = false;
  const int64_t rows_per_unit = std::max<int64_t>(1, std::min(a_.n, group) * rows_ / (8 * (int64_t)a_.threads));
  std::vector<Phase> phases;
  for (base_ = 0; base_ < a_.n; base_ += group) {
    const int64_t first = base_, n = std::min(group, a_.n - first), rows = n * rows_;
    phases.clear();
    if (arranged_ != nullptr && first == 0) {
      const int64_t tiles = (out_group_ + kLanes - 1) / kLanes, depth = (int64_t)a_.kh * a_.kw * words_;
      const int64_t all = a_.groups * tiles_ * depth, units = std::min(all, kArrangeUnits);
      phases.push_back({units, [=](int64_t u) {
                          inner_.arrange(a_.tiles, tiles, depth, all * u / units, all * (u + 1) / units, arranged_);
                        }, nullptr, false});
    }
    if (a_.k != nullptr) {
      phases.push_back({n * parts_, [=](int64_t u) { sum_part(first, u); }, [=] { threshold(first, n); }, flip});
      flip = !flip;
    } else {
      threshold(first, n);
    }
    phases.push_back({n * parts_, [=](int64_t u) { pack_part(first + u / parts_, u % parts_); }, [=] { scale(first, n); }, flip});
    flip = !flip;
    phases.push_back({(rows + rows_per_unit - 1) / rows_per_unit, [=](int64_t u) {
                        convolve(first, u * rows_per_unit, std::min(rows, (u + 1) * rows_per_unit));
                      }, nullptr, flip});
    flip = !flip;
    run_phases(a_.threads, phases);
  }
}

void Layer::allocate(int64_t group) {
  const int64_t sample_words = a_.depthwise ? a_.h * words_ * plane_ : a_.h * a_.w * row_words_;
  size_t at = 0;
  auto take = [&at](int64_t bytes) {
    const size_t start = at;
    at += (size_t)round_up(bytes, 64);
    return start;
  };
  const size_t beta = take(group * cin_padded_ * 4), scale = take(group * cout_padded_ * 4), middle = take(group * 4);
  const size_t partial = take(group * parts_ * a_.cin * 8 + 64);
  const size_t distances = take(group * parts_ * 8);
  const size_t bits = take(group * sample_words * 4 + 64);
  const bool arranged = inner_.arrange != nullptr && !a_.depthwise;
  const size_t weights = take(arranged ? a_.groups * tiles_ * a_.kh * a_.kw * words_ * stride_ * 4 : 0);
  char* memory = shared_buffer.get(at);
  beta_ = reinterpret_cast<float*>(memory + beta);
  scale_ = reinterpret_cast<float*>(memory + scale);
  middle_ = reinterpret_cast<float*>(memory + middle);
  partial_ = reinterpret_cast<double*>(memory + partial);
  distances_ = reinterpret_cast<double*>(memory + distances);
  bits_ = reinterpret_cast<uint32_t*>(memory + bits);
  if (arranged) weights_ = arranged_ = reinterpret_cast<uint32_t*>(memory + weights);
}

Layer::Scratch Layer::scratch() const {
  Scratch s;
  size_t at = 0;
  auto take = [&at](int64_t bytes) {
    const size_t start = at;
    at += (size_t)round_up(bytes, 64);
    return start;
  };
  const size_t buffer = take(buffered_ ? row_pixels_ * a_.cout * 4 + 64 : 0);
  const size_t pixel = take(cin_padded_ * 4), source = take(row_pixels_ * (int64_t)sizeof(void*));
  const size_t kvalid = take((row_pixels_ + kLanes) * 4);
  const int64_t bypass_pixels = pointwise_ ? row_pixels_ : a_.w * (a_.bypass == BD_BYPASS_AVERAGE ? a_.kh : 1);
  const size_t room_at = take(a_.bypass == BD_BYPASS_NONE ? 0 : room(bypass_pixels));
  char* memory = row_buffer.get(at);
  s.buffer = buffered_ ? reinterpret_cast<float*>(memory + buffer) : nullptr;
  s.pixel = reinterpret_cast<float*>(memory + pixel);
  s.source = reinterpret_cast<const void**>(memory + source);
  s.kvalid = reinterpret_cast<int32_t*>(memory + kvalid);
  s.room = memory + room_at;
  return s;
}

// Output rows begin..end-1, counted through the samples from `first` on.
void Layer::convolve(int64_t first, int64_t begin, int64_t end) {
  Scratch s = scratch();
  for (int64_t r = begin; r < end; ++r) {
    if (a_.depthwise) {
      depthwise_row(first + r / rows_, r % rows_, s);
    } else {
      row(first + r / rows_, r % rows_, s);
    }
  }
}

void Layer::fill(Epilogue& e, int64_t sample, int64_t first_channel, int channels) const {
  e.dtype = a_.dtype;
  e.scale = scale_ + (sample - base_) * cout_padded_ + first_channel;
  e.bias = a_.bias + first_channel;
  e.slope = a_.slope ? a_.slope + first_channel : nullptr;
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
          if (a_.groups == 1 && last.a + last.n == a && last.w + last.n * stride_ == w) {
            last.n += words_;
            continue;
          }
        }
        s.segments.push_back({a, w, words_});
      }
    const int32_t kvalid = (int32_t)(s.rows.size() * run.taps.size() * in_group_);
    for (int64_t g = 0; g < a_.groups; ++g)
      for (int64_t t = 0; t < tiles_; t += inner_.max_tiles) {
        const int tiles = (int)std::min<int64_t>(inner_.max_tiles, tiles_ - t);
        const int64_t channel = g * out_group_ + t * lanes_;
        const int channels = (int)std::min<int64_t>(tiles * lanes_, out_group_ - t * lanes_);
        const uint32_t* w = weights_ + (g * tiles_ + t) * tile_step;
        Epilogue e;
        fill(e, sample, channel, channels);
        e.kvalid = &kvalid;
        e.kvalid_step = 0;
        e.y_step = run.step * a_.cout;
        e.buffer_step = run.step * a_.cout;
        for (int64_t j = 0; j < count; j += inner_.max_pixels) {
          const int block = (int)std::min<int64_t>(inner_.max_pixels, count - j);
          if (a_.dots == nullptr) fetch(s, sample, channel, channels, before + j, place + run.start + j * run.step, run.step, block);
          inner_.gemm(bits + g * words_ + j * run.in_step * row_words_, run.in_step * row_words_, s.segments.data(),
                      (int64_t)s.segments.size(), w, tile_step, block, tiles, counts, count_step);
          const int64_t ow = run.start + j * run.step;
          const int64_t out = (sample * a_.oh * a_.ow + place + ow) * a_.cout + channel;
          if (a_.dots) {
            write_dots(counts, count_step, block, channels, &kvalid, 0, out, e.y_step);
            continue;
          }
          e.source = direct_ ? s.source + before + j : nullptr;
          e.buffer = buffered_ ? s.buffer + ow * a_.cout + channel : nullptr;
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
  for (int64_t ow = 0; ow < a_.ow; ++ow) s.kvalid[ow] = (int32_t)s.rows.size() * column_taps_[ow];
  const size_t n = s.rows.size() * (size_t)a_.kw;
  s.taps.resize(n);
  s.valid.resize(n);
  s.weights.resize(n);
  const uint32_t* bits = bits_ + (sample - base_) * a_.h * words_ * plane_;
  int32_t counts[kLanes * 32];
  char* y = static_cast<char*>(a_.y);
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
        s.valid[i] = valid_.data() + at;
        s.weights[i] = a_.tiles[((int64_t)row.k * a_.kw + k) * words_ + word];
      }
    for (int64_t ow = 0; ow < a_.ow; ow += kLanes) {
      const int block = (int)std::min<int64_t>(kLanes, a_.ow - ow);
      inner_.depthwise(s.taps.data(), s.valid.data(), s.weights.data(), (int)n,
                       !inside_[ow / kLanes], counts);
      for (size_t t = 0; t < n; ++t) {
        s.taps[t] += kLanes;
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
      e.y = y + out * element_;
      inner_.finish(counts, 32, block, e);
    }
  }
}

}  // namespace bd
