// The C interface of the training kernels: plain pointers and sizes, no torch, no Python.
//
// They do what bidensify/nn says in torch operations (the reference), in fewer passes over the activations. Every sum is
// taken in a fixed order: results depend neither on the number of threads nor on the other samples of a batch.
#ifndef BIDENSIFY_TRAIN_H
#define BIDENSIFY_TRAIN_H

#include <stdint.h>

#if defined(_WIN32)
#define BDT_API __declspec(dllexport)
#else
#define BDT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif



// With BDT_TWO_PLANES added, alpha is the step of four levels, 1.248 * exp(a) * distance, or 1.
enum bdt_scale { BDT_PER_TENSOR = 0, BDT_PER_CHANNEL = 1, BDT_NO_SCALE = 2, BDT_TWO_PLANES = 4 };

// An activation of n samples, c channels and s positions: (n, c, s) dense, or (n, s, c) with last = 1;
// float32, or bfloat16 with half = 1.
typedef struct bdt_shape {
  int64_t n, c, s;
  int32_t last, half, threads;
} bdt_shape;

// DAB. Statistics (mean, beta, distance: (n, c); alpha: (n) or, per channel, (n, c)) and the output in the dtype of x.
// fused, where groups > 0, is the fusion-down of x to `groups` channels. A null y is not written (with channels first, fused neither).
typedef struct bdt_dab {
  int32_t scale;
  int64_t groups;
  const void* x;
  const float *k, *b, *a;
  float *mean, *beta, *distance, *alpha;
  void *y, *fused;
} bdt_dab;

// The gradient of the above for grad (of y) and grad_fused (or null; (n, groups, s), groups == c adds it as it is).
typedef struct bdt_dab_grad {
  int32_t scale;
  int64_t groups;
  const void *x, *grad, *grad_fused;
  const float *mean, *beta, *distance, *alpha;
  void* grad_x;
  float *grad_k, *grad_b, *grad_a;  // (c), (c), (1)
} bdt_dab_grad;

// y = act(x * scale + shift + bypass): BatchNorm with the given mean and variance (or none), bypass (or null), RPReLU
// (or null slope).
typedef struct bdt_post {
  double eps;
  const void *x, *bypass;
  const float *mean, *variance, *weight, *bias;  // (c) each, or all null
  const float *bias_in, *slope, *bias_out;       // (c) each, or all null
  void* y;
} bdt_post;

// The gradient of the above with mean and variance of the batch itself.
typedef struct bdt_post_grad {
  bdt_post forward;  // y is not read
  const void* grad;
  void *grad_x, *grad_bypass;  // grad_bypass may be null; without a norm only grad_bypass is written
  float *grad_weight, *grad_bias, *grad_bias_in, *grad_slope, *grad_bias_out;
} bdt_post_grad;

// Evaluation (bidensify/exact), channels innermost. Thresholds (n, c), -1 and +1 (n, s, c), and alpha (n) where a is not null;
// with two planes -3, -1, 1 and 3, and in alpha half a step.
typedef struct bdt_codes {
  int32_t planes;
  const void* x;
  const float *k, *b, *a;
  float *beta, *alpha, *y;
} bdt_codes;

// y = act((dot * (scale * half) + bias) + extra), y in float32 or, with half = 1 in the shape, bfloat16; y may be dot.
typedef struct bdt_finish {
  const float *dot, *half, *extra;          // (n, s, c); (n) or null; (n, s, c) or null
  const float *scale, *bias, *slope, *post;  // (c) each, slope and post or null
  void* y;
} bdt_finish;

// The instruction set in use: "avx512", "avx2" or "portable".
BDT_API const char* bdt_instruction_set(void);
// Changes it; 1 where it was not built or the processor lacks it.
BDT_API int32_t bdt_use(const char* name);
BDT_API int32_t bdt_dab_forward(const bdt_shape* shape, const bdt_dab* args);
// y alone, from beta and alpha.
BDT_API int32_t bdt_dab_again(const bdt_shape* shape, const bdt_dab* args);
BDT_API int32_t bdt_dab_backward(const bdt_shape* shape, const bdt_dab_grad* args);
// Mean and biased variance (c) over samples and positions.
BDT_API int32_t bdt_moments(const bdt_shape* shape, const void* x, float* mean, float* variance);
BDT_API int32_t bdt_post_forward(const bdt_shape* shape, const bdt_post* args);
BDT_API int32_t bdt_post_backward(const bdt_shape* shape, const bdt_post_grad* args);
// Rows of a float32 weight: scale = mean |w| (computed where `measure`), y = scale * sign(w).
BDT_API int32_t bdt_weight_forward(int64_t rows, int64_t columns, int32_t threads, const float* w, int32_t measure,
                                   float* scale, float* y);
// grad_w = grad * scale * 1[|w| <= 1].
BDT_API int32_t bdt_weight_backward(int64_t rows, int64_t columns, int32_t threads, const float* w, const float* scale,
                                    const float* grad, float* grad_w);
BDT_API int32_t bdt_eval_codes(const bdt_shape* shape, const bdt_codes* args);
BDT_API int32_t bdt_eval_finish(const bdt_shape* shape, const bdt_finish* args);
// Rows of a float32 weight: scale = mean |w| with its sum in float64, y = sign(w).
BDT_API int32_t bdt_eval_signs(int64_t rows, int64_t columns, int32_t threads, const float* w, float* scale, float* y);

#ifdef __cplusplus
}
#endif
#endif
