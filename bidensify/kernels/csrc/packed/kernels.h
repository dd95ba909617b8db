// The table of inner loops that each instruction set fills in.
#ifndef BIDENSIFY_INNER_H
#define BIDENSIFY_INNER_H

#include <stdint.h>

#include "bidensify_kernels.h"

namespace bd {

constexpr int kLanes = 16;        // output channels per stored weight tile
constexpr int kMaxPixels = 16;    // pixels per block that any table asks for
constexpr int kMaxChannels = 64;  // output channels per block that any table asks for
// Pixels whose sum is taken in float32, in an order that bidensify/exact defines; blocks begin at its multiples,
// and their sums are added in float64, where order no longer shows.
constexpr int64_t kBlock = 64;

// A stretch of consecutive activation words and the weight words they meet.
struct Segment {
  int64_t a;   // offset in words from the block's first pixel
  int64_t w;   // offset in words from the tile
  int64_t n;   // number of activation words
  int64_t bytes;  // of them, from the first on, that hold channels
};

struct Epilogue {
  int dtype;
  const int32_t* kvalid;     // per pixel, or one value with kvalid_step 0
  int kvalid_step;
  const float* scale;        // at the block's first channel
  const float* bias;
  const float* offset;       // or null
  const float* window;       // with offset: per pixel, the sum of its window's activations
  int64_t window_step;
  const float* rise;         // or null; with slope alone
  const float* slope;        // or null
  const float* clamp;        // or null: two bounds
  const float* post;         // or null
  const void* const* source; // per pixel, or null: bypass pixels in dtype
  int64_t source_channel;    // first channel in the source pixel
  int64_t source_wrap;       // channels after which the source starts again
  int64_t source_sum;        // channels c, c + source_stride, ... that are averaged
  int64_t source_stride;
  const float* buffer;       // or null: per pixel, at the block's first channel
  bool last;                 // source or buffer join behind the activation
  const float* early;        // or null: as buffer, always before it
  int64_t buffer_step;
  void* y;                   // first pixel, at the block's first channel
  int64_t y_step;            // elements between pixels
  int channels;              // of the block
};

struct Inner {
  int max_pixels, max_tiles;
  int max_pixels2;  // of gemm2
  int few_pixels;   // at most either: of layers with many popcounts for each value of the output
  int lanes;  // output channels per tile as gemm reads it: 16, or 32 with an arrangement of its own
  int stride;  // 32-bit words that one activation word meets per tile, as gemm reads them
  bool bytes;  // gemm reads a segment's bytes, not its words: segments of several taps must be full
  // Rearranges 16-lane tiles (groups, tiles_per_group, depth words, 16) to what gemm reads, or null where that is the same:
  // words first..last-1, counted through (groups, tiles of `lanes` channels, depth).
  void (*arrange)(const uint32_t* tiles, int64_t tiles_per_group, int64_t depth, int64_t first, int64_t last, uint32_t* out);
  // acc[c] += sum over one block's pixels of x[pixel][c], x dense: quads (x0 + x1) + (x2 + x3) of consecutive pixels, one after
  // the other. A missing pixel counts as 0.
  void (*sum)(const void* x, int dtype, int64_t pixels, int64_t c, float* acc);
  // Words of (x >= beta) for one block of pixels. With acc (room for c + 16) the block's sums of |x - beta| per channel, in
  // quads as above, are added to the 16 lanes, channel c to lane c % 16.
  void (*pack)(const void* x, int dtype, int64_t pixels, int64_t x_step, int64_t c, const float* beta, uint32_t* out,
               const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step, float* acc, double* lanes);
  // As pack without words: the distances alone.
  void (*measure)(const void* x, int dtype, int64_t pixels, int64_t c, const float* beta, float* acc, double* lanes);
  // Words of two planes, the second's `second` words behind the first's: x >= beta, and x >= beta + step where that holds,
  // x >= beta - step where it does not.
  void (*pack2)(const void* x, int dtype, int64_t pixels, int64_t x_step, int64_t c, const float* beta, float step,
                uint32_t* out, int64_t second, const int64_t* pixel_offset, int64_t pixel_step, int64_t word_step);
  // Rearranges n words of both planes, in place, to what gemm2 reads, or null where that is the same.
  void (*merge)(uint32_t* first, uint32_t* second, int64_t n);
  // counts[p * count_step + channel] = popcount over all segments, of max_tiles tiles at most.
  void (*gemm)(const uint32_t* a, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w, int64_t tile_step,
               int pixels, int channels, int32_t* counts, int64_t count_step);
  // The same of two planes that meet the same weights: twice the first's popcount and the second's.
  void (*gemm2)(const uint32_t* a, int64_t second, int64_t a_step, const Segment* segments, int64_t n, const uint32_t* w,
                int64_t tile_step, int pixels, int channels, int32_t* counts, int64_t count_step);
  // Popcounts of 16 pixels x 32 channels over the taps: taps[i] points at 16 activation words, valid[i] at 16 masks
  // (read only where masked: some tap of some pixel is outside the image).
  void (*depthwise)(const uint32_t* const* taps, const uint32_t* const* valid, const uint32_t* weights, int n, bool masked,
                    int32_t* counts);
  void (*finish)(const int32_t* counts, int64_t count_step, int pixels, const Epilogue& e);
  // out[c] = mean over the given pixels.
  void (*average)(const void* const* pixels, int n, int dtype, int64_t c, float* out);
  // Fusion-up or fusion-down of one pixel: (cin) in dtype -> (cout).
  void (*fuse)(const void* pixel, int dtype, int64_t cin, int64_t cout, float* out);
  // out[i] += factor[i] * x[i], factor null for 1.
  void (*accumulate)(const void* x, int dtype, const float* factor, int64_t n, float* out);
};

const Inner* portable_inner();
const Inner* avx2_inner();
const Inner* avx512_inner();
const Inner* neon_inner();

}  // namespace bd
#endif
