// The C interface of the kernels: plain pointers and sizes, no torch, no Python.
#ifndef BIDENSIFY_KERNELS_H
#define BIDENSIFY_KERNELS_H

#include <stdint.h>

#if defined(BD_API)
// Part of another library, which exports none of this.
#elif defined(_WIN32)
#define BD_API __declspec(dllexport)
#else
#define BD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever bd_conv_args or a function's meaning changes; the Python side refuses another number.
#define BD_ABI_VERSION 3

enum bd_tier { BD_PORTABLE = 0, BD_AVX2 = 1, BD_AVX512 = 2, BD_NEON = 3, BD_TIERS = 4 };
enum bd_dtype { BD_FLOAT32 = 0, BD_BFLOAT16 = 1 };
enum bd_bypass { BD_BYPASS_NONE = 0, BD_BYPASS_INDEX = 1, BD_BYPASS_AVERAGE = 2 };
enum bd_status { BD_OK = 0, BD_BAD_ARGUMENT = 1, BD_NO_MEMORY = 2, BD_NO_TIER = 3 };

// One packed layer on one input. All tensors are dense NHWC; pointers may be null where a comment says so.
typedef struct bd_conv_args {
  int64_t n, h, w, cin, oh, ow, cout;
  int32_t kh, kw, sh, sw, dh, dw;
  int32_t pad_top, pad_left;
  int32_t groups;
  int32_t transposed;
  int32_t depthwise;  // words run across channels (cin == cout == groups)
  int32_t planes;     // bit planes of the activations, 1 or 2: middle + half * s1, or middle + half * (s1 + s2 / 2)
  int32_t dtype;      // of x, y and residual
  int32_t bypass;
  int32_t bypass_pad_h, bypass_pad_w;  // of the averaging windows
  int32_t bypass_last;  // bypass and residual join behind the activation
  int32_t tier;
  int32_t threads;
  const void* x;
  void* y;
  const void* residual;    // or null: added where the bypass is
  const uint32_t* tiles;   // weight words: (groups, tiles, kh, kw, words, 16) or depthwise (kh, kw, words)
  int64_t tiles_length;    // number of words, checked against the geometry
  const float* k;          // or null: (cin)
  const float* b;          // or null: (cin)
  const float* a;          // or null: (1); two planes: half = 1.248 * exp(a) * the sample's mean distance
  const float* levels;     // or null: (2) or, with per_sample_levels, (n, 2): low and high
  int32_t per_sample_levels;
  const float* thresholds; // or null: (n, cin), added to k and b's
  const float* scale;      // (cout)
  const float* bias;       // (cout)
  const float* offset;     // or null: (cout), of the sum of each window's binarized activations
  const float* rise;       // or null: (cout), of the activation's positive side; with slope alone
  const float* slope;      // or null: (cout), of its negative side
  const float* clamp;      // or null: (2), its bounds
  const float* post;       // or null: (cout)
  const int32_t* rows;     // (oh) source row of the bypass, for BD_BYPASS_INDEX
  const int32_t* cols;     // (ow)
  int32_t* dots;           // or null: (n, oh, ow, cout) receives the integer dot products (two planes: 2 P1 + P2) instead of
                           // y (tests)
} bd_conv_args;

// Some channels of an input that lies in several tensors: dense NHWC (n, h / up_h, w / up_w, channels), each pixel standing
// for up_h x up_w of the input's (nearest-neighbour upsampling).
typedef struct bd_part {
  const void* x;
  int64_t channels;
  int32_t up_h, up_w;
} bd_part;

BD_API int32_t bd_abi_version(void);
// Bit i is set where tier i was built and this processor runs it.
BD_API uint32_t bd_tiers(void);
// Lets layers run on an OpenMP runtime that is already in the process (torch's own), through its GOMP_parallel: the same
// threads then serve both. Null goes back to the library's own pool.
typedef void (*bd_parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
BD_API void bd_set_parallel(bd_parallel parallel);
// Runs a layer; returns a bd_status.
BD_API int32_t bd_packed_conv2d(const bd_conv_args* args);
// The same where x lies in parts, which hold its channels in order; args->x is not read.
BD_API int32_t bd_packed_conv2d_parts(const bd_conv_args* args, const bd_part* parts, int32_t count);
// Weight words of a layer, of w >= 0: w is float32 (cout, cin / groups, kh, kw) with these strides in elements. Of args its
// sizes, groups, depthwise and tiles_length are read; no transposed layers.
BD_API int32_t bd_weight_tiles(const bd_conv_args* args, const float* w, const int64_t* strides, uint32_t* tiles);

// y = parts[0] + parts[1] + ..., one after the other, then RPReLU where slope is not null; float32, dense NHWC.
typedef struct bd_sum_args {
  int64_t n, h, w, c;
  int32_t threads, count;  // of parts: 2 to 16, all of c channels
  const bd_part* parts;
  const float *bias_in, *slope, *bias_out;  // (c) each, or all null
  float* y;
} bd_sum_args;
BD_API int32_t bd_sum(const bd_sum_args* args);

// Memory for a tensor (n, c, h, w), dense NHWC, which the library keeps from one tensor to the next: a DLManagedTensor of
// DLPack, whose deleter gives the memory back, from any thread. The type as DLPack says it: a code (0 int, 2 float, 4 bfloat)
// and bits. Null where there is none to be had: take other memory.
BD_API void* bd_tensor_new(const int64_t* shape, int32_t code, int32_t bits);
// For a tensor that nothing took over.
BD_API void bd_tensor_free(void* tensor);
// Gives what is kept and holds no tensor back to the system.
BD_API void bd_memory_release(void);
// Bytes in tensors that are alive, and bytes kept for tensors, with these.
BD_API void bd_memory_count(int64_t* live, int64_t* kept);

#ifdef __cplusplus
}
#endif
#endif
