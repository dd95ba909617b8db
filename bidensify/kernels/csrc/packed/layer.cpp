#include "layer.h"

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
constexpr int64_t kFewBits = 64;

// Whether some sample's two values are not -v and v.
bool lopsided(const bd_conv_args& a) {
  if (a.levels == nullptr) return false;
  for (int64_t i = 0; i < (a.per_sample_levels ? a.n : 1); ++i)
    if (a.levels[2 * i] + a.levels[2 * i + 1] != 0) return true;
  return false;
}

// Of the thread that called: words, thresholds, scales, for the length of one call.
thread_local Buffer shared_buffer;

}  // namespace

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
  // Blocks of many pixels pay where popcounts are few: they set up what follows once, and may leave out bytes without channels.
  const bool small = out_group_ <= kLanes || (int64_t)a_.kh * a_.kw * in_group_ <= kFewBits;
  block_pixels_ = small ? inner_.max_pixels : inner_.few_pixels;
  tap_bytes_ = inner_.bytes && small ? (in_group_ + 7) / 8 : words_ * 4;
  row_words_ = words_ * (a_.depthwise ? 1 : a_.groups);
  cin_padded_ = round_up(a_.cin, kLanes) + kLanes;
  cout_padded_ = round_up(a_.cout, kLanes) + kLanes;
  distance_ = a_.a != nullptr;
  unit_ = a_.planes == 2 ? 3 : 1;

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

  blocks_ = 0;
  if (a_.depthwise) {
    blocks_ = words_ * ((a_.ow + kLanes - 1) / kLanes);
  } else {
    for (const Run& run : runs_) blocks_ += (run.count + block_pixels_ - 1) / block_pixels_;
    blocks_ *= a_.groups * ((tiles_ + inner_.max_tiles - 1) / inner_.max_tiles);
  }

  const bool middle = lopsided(a_);
  const bool whole_up = a_.cout == a_.cin || (a_.cout % a_.cin == 0 && a_.cin >= kLanes);
  const bool whole_down = a_.cout < a_.cin && a_.cin % a_.cout == 0;
  // What is added before the activation is added up first: several things meet in the buffer.
  const bool inside = middle || (a_.offset != nullptr && a_.depthwise);
  early_ = inside && a_.bypass_last;
  const bool more = a_.residual != nullptr || (inside && !early_);
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
    if (a_.planes == 2) {
      add_planes(&phases, first, n, &flip);
    } else {
      phases.push_back({n * parts_, [=](int64_t u) { pack_part(first + u / parts_, u % parts_); }, [=] { scale(first, n); }, flip});
      flip = !flip;
    }
    const bool backwards = flip;
    phases.push_back({(rows + rows_per_unit - 1) / rows_per_unit, [=](int64_t u) {
                        convolve(first, u * rows_per_unit, std::min(rows, (u + 1) * rows_per_unit), backwards);
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
  const size_t beta = take(group * cin_padded_ * 4), scale = take(group * cout_padded_ * 4), middle = take(group * 4), half = take(group * 4), step = take(group * 4);
  const size_t ones = take(a_.offset != nullptr && !a_.depthwise ? group * a_.h * a_.w * a_.groups * 4 : 0);
  const size_t partial = take(group * parts_ * a_.cin * 8 + 64);
  const size_t distances = take(group * parts_ * 8);
  second_ = a_.planes == 2 ? round_up(group * sample_words, 16) : 0;
  const size_t bits = take((second_ + group * sample_words) * 4 + 64);
  const bool arranged = inner_.arrange != nullptr && !a_.depthwise;
  const size_t weights = take(arranged ? a_.groups * tiles_ * a_.kh * a_.kw * words_ * stride_ * 4 : 0);
  char* memory = shared_buffer.get(at);
  beta_ = reinterpret_cast<float*>(memory + beta);
  scale_ = reinterpret_cast<float*>(memory + scale);
  middle_ = reinterpret_cast<float*>(memory + middle);
  half_ = reinterpret_cast<float*>(memory + half);
  step_ = reinterpret_cast<float*>(memory + step);
  ones_ = a_.offset != nullptr && !a_.depthwise ? reinterpret_cast<int32_t*>(memory + ones) : nullptr;
  partial_ = reinterpret_cast<double*>(memory + partial);
  distances_ = reinterpret_cast<double*>(memory + distances);
  bits_ = reinterpret_cast<uint32_t*>(memory + bits);
  if (arranged) weights_ = arranged_ = reinterpret_cast<uint32_t*>(memory + weights);
}

}  // namespace bd
