// Replays recorded layers through every tier of the library that this processor runs, and compares with what the reference
// path gave. Plain C++: it runs where there is no Python (under an emulator) and under AddressSanitizer, with every array in
// a block of exactly its size.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "bidensify_kernels.h"

namespace {

FILE* file;

void read_exactly(void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, file) != bytes) {
    fprintf(stderr, "the case file is truncated\n");
    exit(2);
  }
}

// An array in a heap block of its own, or null.
void* array(int64_t* bytes_out = nullptr) {
  int64_t bytes;
  read_exactly(&bytes, sizeof bytes);
  if (bytes_out) *bytes_out = bytes;
  if (bytes < 0) return nullptr;
  void* data = malloc((size_t)(bytes ? bytes : 1));
  read_exactly(data, (size_t)bytes);
  return data;
}

float from_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

// The first half of the channels of all pixels, then the second.
std::vector<char> split(const bd_conv_args& a, size_t element) {
  const int64_t half = a.cin / 2 * (int64_t)element, rest = a.cin * (int64_t)element - half, pixels = a.n * a.h * a.w;
  std::vector<char> out((size_t)(pixels * (half + rest)));
  for (int64_t p = 0; p < pixels; ++p) {
    const char* x = (const char*)a.x + p * (half + rest);
    memcpy(out.data() + p * half, x, (size_t)half);
    memcpy(out.data() + pixels * half + p * rest, x + half, (size_t)rest);
  }
  return out;
}

const char* const kNames[] = {"portable", "avx2", "avx512", "neon"};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !(file = fopen(argv[1], "rb"))) {
    fprintf(stderr, "usage: replay CASES\n");
    return 2;
  }
  int64_t cases;
  read_exactly(&cases, sizeof cases);
  int failures = 0, runs = 0;
  for (int64_t c = 0; c < cases; ++c) {
    bd_conv_args a;
    memset(&a, 0, sizeof a);
    int64_t sizes[7];
    int32_t numbers[18];
    read_exactly(sizes, sizeof sizes);
    read_exactly(numbers, sizeof numbers);
    a.n = sizes[0], a.h = sizes[1], a.w = sizes[2], a.cin = sizes[3], a.oh = sizes[4], a.ow = sizes[5], a.cout = sizes[6];
    a.kh = numbers[0], a.kw = numbers[1], a.sh = numbers[2], a.sw = numbers[3], a.dh = numbers[4], a.dw = numbers[5];
    a.pad_top = numbers[6], a.pad_left = numbers[7], a.groups = numbers[8], a.transposed = numbers[9];
    a.depthwise = numbers[10], a.dtype = numbers[11], a.bypass = numbers[12], a.bypass_pad_h = numbers[13];
    a.bypass_pad_w = numbers[14], a.per_sample_levels = numbers[15], a.bypass_last = numbers[16];
    a.planes = numbers[17];
    std::vector<void*> blocks;
    int64_t tile_bytes = 0;
    auto next = [&](int64_t* bytes = nullptr) {
      blocks.push_back(array(bytes));
      return blocks.back();
    };
    a.x = next(), a.residual = next(), a.tiles = (const uint32_t*)next(&tile_bytes), a.tiles_length = tile_bytes / 4;
    a.k = (const float*)next(), a.b = (const float*)next(), a.a = (const float*)next(), a.levels = (const float*)next();
    a.thresholds = (const float*)next(), a.scale = (const float*)next(), a.bias = (const float*)next();
    a.offset = (const float*)next(), a.rise = (const float*)next(), a.slope = (const float*)next();
    a.clamp = (const float*)next(), a.post = (const float*)next();
    a.rows = (const int32_t*)next(), a.cols = (const int32_t*)next();
    int64_t y_bytes = 0, dot_bytes = 0;
    const float* want = (const float*)next(&y_bytes);
    const int32_t* want_dots = (const int32_t*)next(&dot_bytes);
    const int64_t count = a.n * a.oh * a.ow * a.cout;
    if (y_bytes != count * 4 || dot_bytes != count * 4) {
      fprintf(stderr, "case %d: the record is damaged\n", (int)c);
      return 2;
    }
    const size_t element = a.dtype == BD_FLOAT32 ? 4 : 2;
    float largest = 1e-6f;
    for (int64_t i = 0; i < count; ++i) largest = fmaxf(largest, fabsf(want[i]));
    // The reference computes in the same order: nothing but the last bit of an exponential may differ.
    const float allowed = (a.dtype == BD_FLOAT32 ? 1e-7f : 4e-3f) * largest;
    for (int tier = 0; tier < BD_TIERS; ++tier) {
      if (!(bd_tiers() >> tier & 1)) continue;
      a.tier = tier;
      for (int threads = 1; threads <= 2; ++threads) {
        a.threads = threads;
        void* y = malloc((size_t)count * element);
        int32_t* dots = (int32_t*)malloc((size_t)count * 4);
        a.y = y, a.dots = nullptr;
        int32_t status = bd_packed_conv2d(&a);
        a.y = nullptr, a.dots = dots;
        if (!status) status = bd_packed_conv2d(&a);
        float error = 0;
        bool exact = true;
        for (int64_t i = 0; i < count && !status; ++i) {
          const float got = a.dtype == BD_FLOAT32 ? ((float*)y)[i] : from_bf16(((uint16_t*)y)[i]);
          error = fmaxf(error, fabsf(got - want[i]));
          if (!(fabsf(got - want[i]) <= allowed)) error = fmaxf(error, allowed * 2);
          exact = exact && dots[i] == want_dots[i];
        }
        ++runs;
        if (status || error > allowed || !exact) {
          ++failures;
          fprintf(stderr, "case %d, %s, %d threads: status %d, error %g (allowed %g), dot products %s\n", (int)c, kNames[tier],
                  threads, (int)status, (double)error, (double)allowed, exact ? "exact" : "WRONG");
        }
        // The same input in two parts gives the same bits.
        if (a.cin > 1) {
          void* again = malloc((size_t)count * element);
          const std::vector<char> halves = split(a, element);
          const int64_t half = a.cin / 2, pixels = a.n * a.h * a.w;
          const bd_part parts[2] = {{halves.data(), half, 1, 1},
                                    {halves.data() + pixels * half * (int64_t)element, a.cin - half, 1, 1}};
          bd_conv_args b = a;
          b.x = nullptr, b.dots = nullptr, b.y = again;
          if (bd_packed_conv2d_parts(&b, parts, 2) || memcmp(y, again, (size_t)count * element)) {
            ++failures;
            fprintf(stderr, "case %d, %s, %d threads: parts give something else\n", (int)c, kNames[tier], threads);
          }
          if (bd_packed_conv2d_parts(&b, parts, 1) != BD_BAD_ARGUMENT) ++failures, fprintf(stderr, "case %d: half an input was taken\n", (int)c);
          free(again);
        }
        free(y);
        free(dots);
      }
    }
    // Arguments that do not fit must be refused, not followed.
    bd_conv_args bad = a;
    bad.tiles_length -= 1;
    if (bd_packed_conv2d(&bad) != BD_BAD_ARGUMENT) ++failures, fprintf(stderr, "case %d: short tiles were taken\n", (int)c);
    bad = a;
    bad.groups = a.cin + 1;
    if (bd_packed_conv2d(&bad) != BD_BAD_ARGUMENT) ++failures, fprintf(stderr, "case %d: bad groups were taken\n", (int)c);
    bad = a;
    bad.planes = c % 2 ? 0 : 3;
    if (bd_packed_conv2d(&bad) != BD_BAD_ARGUMENT) ++failures, fprintf(stderr, "case %d: bad planes were taken\n", (int)c);
    bad = a;
    bad.tier = BD_TIERS;
    if (bd_packed_conv2d(&bad) != BD_NO_TIER) ++failures, fprintf(stderr, "case %d: a bad tier was taken\n", (int)c);
    for (void* block : blocks) free(block);
  }
  printf("%d cases, %d runs on tiers", (int)cases, runs);
  for (int tier = 0; tier < BD_TIERS; ++tier)
    if (bd_tiers() >> tier & 1) printf(" %s", kNames[tier]);
  printf(", %d failures\n", failures);
  return failures ? 1 : 0;
}
