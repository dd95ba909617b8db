// The passes of two bit planes: distances, whose mean is the step, then the bits of both planes; and their popcounts.
#include <algorithm>

#include "layer.h"
#include "scratch.h"

namespace bd {
namespace {

constexpr uint8_t kAllSeen = 15;

// Which of 0 and 1 are among the used bits of words that come in periods of `words`, the last with `last` used bits.
uint8_t values_in(const uint32_t* at, int64_t count, int64_t words, uint32_t last) {
  uint32_t ones = 0, zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    ones |= at[i];
    zeros |= at[i] ^ ((i + 1) % words ? 0xffffffffu : last);
  }
  return (uint8_t)((zeros != 0) | (ones != 0) << 1);
}

}  // namespace

// Sums, bits and what follows them, as phases.
void Layer::add_planes(std::vector<Phase>* phases, int64_t first, int64_t n, bool* flip) {
  auto over_parts = [&](void (Layer::*unit)(int64_t, int64_t), std::function<void()> after) {
    phases->push_back({n * parts_, [=](int64_t u) { (this->*unit)(first + u / parts_, u % parts_); }, after, *flip});
    *flip = !*flip;
  };
  if (distance_) {
    over_parts(&Layer::measure_part, [=] { scale(first, n); });
  } else {
    scale(first, n);
  }
  seen_.assign((size_t)(n * parts_), 0);
  over_parts(&Layer::pack2_part, [=] { note_constant_planes(n); });
  if (inner_.merge != nullptr && !a_.depthwise) over_parts(&Layer::merge_part, nullptr);
}

void Layer::measure_part(int64_t sample, int64_t part) {
  const int64_t s = sample - base_, end = part_start(part + 1);
  char* memory = row_buffer.get((size_t)(cin_padded_ * 4 + room(kBlock)));
  double lanes[kLanes] = {};
  for (int64_t p = part_start(part); p < end; p += kBlock) {
    const int64_t n = std::min(kBlock, end - p);
    inner_.measure(pixels(sample, p, n, memory + cin_padded_ * 4), a_.dtype, n, a_.cin, beta_ + s * cin_padded_,
                   reinterpret_cast<float*>(memory), lanes);
  }
  double distance = 0;
  for (double lane : lanes) distance += lane;
  distances_[s * parts_ + part] = distance;
}

void Layer::pack2_part(int64_t sample, int64_t part) {
  const int64_t s = sample - base_, end = part_start(part + 1);
  const float* beta = beta_ + s * cin_padded_;
  const float step = step_[s];
  char* memory = row_buffer.get((size_t)(cin_padded_ * 4 + room(kBlock)));
  const uint32_t last = in_group_ % 32 ? (1u << in_group_ % 32) - 1 : 0xffffffffu;
  uint8_t seen = a_.depthwise ? kAllSeen : 0;
  for (int64_t p = part_start(part); p < end; p += kBlock) {
    const int64_t n = std::min(kBlock, end - p);
    const char* x = pixels(sample, p, n, memory + cin_padded_ * 4);
    if (a_.depthwise) {
      int64_t places[kBlock];
      place_pixels(p, n, places);
      inner_.pack2(x, a_.dtype, n, a_.cin, a_.cin, beta, step, bits_ + s * a_.h * words_ * plane_, second_, places, 0, plane_);
      continue;
    }
    uint32_t* out = bits_ + (s * a_.h * a_.w + p) * row_words_;
    for (int64_t g = 0; g < a_.groups; ++g)
      inner_.pack2(x + g * in_group_ * element_, a_.dtype, n, a_.cin, in_group_, beta + g * in_group_, step, out + g * words_,
                   second_, nullptr, row_words_, 1);
    if (seen != kAllSeen) {
      const int64_t count = n * row_words_;
      seen |= values_in(out, count, words_, last) | values_in(out + second_, count, words_, last) << 2;
    }
    if (ones_ != nullptr) {
      int32_t* ones = ones_ + (s * a_.h * a_.w + p) * a_.groups;
      for (int64_t i = 0; i < n * a_.groups; ++i) {
        int32_t found = 0;
        for (int64_t word = i * words_; word < (i + 1) * words_; ++word)
          found += 2 * __builtin_popcount(out[word]) + __builtin_popcount(out[second_ + word]);
        ones[i] = found;
      }
    }
  }
  seen_[s * parts_ + part] = seen;
}

void Layer::note_constant_planes(int64_t n) {
  mixed_.assign((size_t)n, 0);
  for (int64_t s = 0; s < n; ++s) {
    uint8_t seen = 0;
    for (int64_t part = 0; part < parts_; ++part) seen |= seen_[s * parts_ + part];
    mixed_[s] = (uint8_t)((seen & 3) == 3) | (uint8_t)((seen >> 2) == 3) << 1;
  }
}

void Layer::merge_part(int64_t sample, int64_t part) {
  const int64_t s = sample - base_;
  if (mixed_[s] != 3) return;
  const int64_t from = part_start(part), to = part_start(part + 1);
  uint32_t* at = bits_ + (s * a_.h * a_.w + from) * row_words_;
  inner_.merge(at, at + second_, (to - from) * row_words_);
}

// What constant planes give at every pixel of a run: the popcounts of its first pixel.
void Layer::fixed_counts(const uint32_t* bits, const Scratch& s, const uint32_t* w, int64_t tile_step, int channels, int mixed,
                         int32_t* fixed) const {
  int32_t found[kMaxChannels];
  std::fill(fixed, fixed + kMaxChannels, 0);
  for (int plane = 0; plane < 2; ++plane) {
    if (mixed >> plane & 1) continue;
    inner_.gemm(bits + plane * second_, 0, s.segments.data(), (int64_t)s.segments.size(), w, tile_step, 1, channels, found,
                kMaxChannels);
    for (int c = 0; c < channels; ++c) fixed[c] += (2 - plane) * found[c];
  }
}

// Popcounts of a block of pixels, of two planes as one number: twice the first's and the second's.
void Layer::popcounts(const uint32_t* bits, int64_t a_step, const Scratch& s, const uint32_t* w, int64_t tile_step, int pixels,
                      int channels, int mixed, const int32_t* fixed, int32_t* counts) const {
  const int64_t n = (int64_t)s.segments.size();
  if (mixed == 3)
    return inner_.gemm2(bits, second_, a_step, s.segments.data(), n, w, tile_step, pixels, channels, counts, kMaxChannels);
  const int32_t weight = mixed == 1 ? 2 : mixed == 2 ? 1 : 0;
  if (weight)
    inner_.gemm(bits + (mixed == 2 ? second_ : 0), a_step, s.segments.data(), n, w, tile_step, pixels, channels, counts,
                kMaxChannels);
  for (int p = 0; p < pixels; ++p)
    for (int c = 0; c < channels; ++c) {
      int32_t& at = counts[p * kMaxChannels + c];
      at = (weight ? weight * at : 0) + fixed[c];
    }
}

void Layer::depthwise_counts(const Scratch& s, const std::vector<uint32_t>& weights, bool masked, int32_t* counts) const {
  const int n = (int)s.taps.size();
  inner_.depthwise(s.taps.data(), s.valid.data(), weights.data(), n, masked, counts);
  if (a_.planes == 1) return;
  int32_t more[kLanes * 32];
  inner_.depthwise(s.taps2.data(), s.valid.data(), weights.data(), n, masked, more);
  for (int i = 0; i < kLanes * 32; ++i) counts[i] = 2 * counts[i] + more[i];
}

}  // namespace bd
