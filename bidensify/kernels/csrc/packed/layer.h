// One packed layer on one input, in three passes: statistics, bits, convolution.
#ifndef BIDENSIFY_LAYER_H
#define BIDENSIFY_LAYER_H

#include <stdint.h>

#include <vector>

#include "kernels.h"
#include "phases.h"
#include "plan.h"

namespace bd {

inline int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

class Layer {
 public:
  Layer(const bd_conv_args& args, const Inner& inner, const bd_part* parts, int32_t part_count);
  void run();

 private:
  struct Scratch;
  void allocate(int64_t group);
  void sum_part(int64_t first, int64_t u);
  void threshold(int64_t first, int64_t n);
  // Where the bits of n pixels from p on lie in a depthwise layer's planes.
  void place_pixels(int64_t p, int64_t n, int64_t* places) const;
  void pack_part(int64_t sample, int64_t part);
  void scale(int64_t first, int64_t n);
  void measure_part(int64_t sample, int64_t part);
  void pack2_part(int64_t sample, int64_t part);
  void note_constant_planes(int64_t n);
  void merge_part(int64_t sample, int64_t part);
  void add_planes(std::vector<Phase>* phases, int64_t first, int64_t n, bool* flip);
  Scratch scratch() const;
  void convolve(int64_t first, int64_t begin, int64_t end, bool backwards);
  void look_ahead(int64_t first, int64_t row, Scratch& s) const;
  void row(int64_t sample, int64_t r, Scratch& s);
  void fixed_counts(const uint32_t* bits, const Scratch& s, const uint32_t* w, int64_t tile_step, int channels, int mixed,
                    int32_t* fixed) const;
  void popcounts(const uint32_t* bits, int64_t a_step, const Scratch& s, const uint32_t* w, int64_t tile_step, int pixels,
                 int channels, int mixed, const int32_t* fixed, int32_t* counts) const;
  void depthwise_counts(const Scratch& s, const std::vector<uint32_t>& weights, bool masked, int32_t* counts) const;
  void fetch(const Scratch& s, int64_t sample, int64_t channel, int channels, int64_t source, int64_t place, int64_t step,
             int block) const;
  void depthwise_row(int64_t sample, int64_t r, Scratch& s);
  void prepare_bypass(int64_t sample, int64_t r, int64_t pixels, Scratch& s);
  void bypass_rows(int64_t r, int64_t* first, int64_t* last) const;
  void add_middle(int64_t sample, int64_t r, Scratch& s, float* to);
  void sum_windows(int64_t sample, int64_t r, Scratch& s);
  void fill(Epilogue& e, int64_t sample, int64_t first_channel, int channels) const;
  int64_t part_start(int64_t part) const;
  const char* pixels(int64_t sample, int64_t first, int64_t count, char* room) const;
  int64_t room(int64_t count) const { return inputs_ ? round_up(count * a_.cin * element_, 64) : 0; }
  void write_dots(const int32_t* counts, int64_t count_step, int pixels, int channels, const int32_t* kvalid, int kvalid_step,
                  int64_t first, int64_t step) const;

  const bd_conv_args& a_;
  const Inner& inner_;
  const bd_part* inputs_;  // or null: x_ is one tensor
  int32_t input_count_;
  const char* x_;
  int64_t element_;
  int64_t in_group_, out_group_, lanes_, stride_, tiles_, words_, row_words_;
  int64_t tap_bytes_;  // of a tap's words, those that gemm has to read
  const uint32_t* weights_;
  uint32_t* arranged_ = nullptr;  // room for the weights as gemm reads them, where that differs
  std::vector<char> inside_;  // depthwise: per output column block, whether every tap is inside
  int64_t parts_;
  int64_t cin_padded_, cout_padded_;
  bool pointwise_, direct_, buffered_, distance_;
  bool early_;  // what joins before the activation has a buffer of its own
  int64_t rows_, row_pixels_;
  int32_t unit_;  // the largest integer that an activation stands for: 1, or 3 with two planes
  int64_t second_ = 0;  // words from the first plane's to the second's
  int block_pixels_;
  int64_t blocks_;  // of a row, each with its own popcounts and last step
  // Depthwise: words of one row lie in planes, one per 32 channels, split by column phase.
  int64_t plane_, phase_length_;
  std::vector<Run> runs_;
  std::vector<int32_t> column_taps_;
  std::vector<int64_t> column_place_;
  std::vector<uint32_t> valid_;
  std::vector<int32_t> tap_sums_;

  // Of the samples in flight.
  int64_t base_ = 0;
  float* beta_ = nullptr;
  float* scale_ = nullptr;
  float* middle_ = nullptr;
  float* half_ = nullptr;
  float* step_ = nullptr;    // of two planes
  int32_t* ones_ = nullptr;  // with an offset: per pixel and group, how many bits are set
  double* partial_ = nullptr;
  double* distances_ = nullptr;
  uint32_t* bits_ = nullptr;
  std::vector<uint8_t> seen_;   // per part: whether the first plane has a 0, a 1, the second a 0, a 1
  std::vector<uint8_t> mixed_;  // per sample: 1 where the first plane is not constant, 2 where the second is not
};

}  // namespace bd
#endif
