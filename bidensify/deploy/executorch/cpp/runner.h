// A program of ExecuTorch, loaded and run through plain C: for languages without headers of ExecuTorch (Python through ctypes).
// C++ programs use executorch/extension/module/module.h and link this library for its operator.
#ifndef BIDENSIFY_RUNNER_H
#define BIDENSIFY_RUNNER_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define BIDENSIFY_API __declspec(dllexport)
#else
#define BIDENSIFY_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bidensify_net bidensify_net;

// A tensor: `dtype` as ExecuTorch numbers them (6 float32, 15 bfloat16, 4 int64, 3 int32, 0 uint8, 11 bool); contiguous.
typedef struct bidensify_tensor {
  void* data;
  int32_t dtype;
  int32_t dims;
  int32_t sizes[16];
  int64_t bytes;
} bidensify_tensor;

// 0 where a .pte is, byte for byte, what `bidensify export` wrote; else `error` says what to do. ExecuTorch itself may crash on one
// that was cut or damaged: C++ programs ask before they load it. It is no protection from files that were made to do harm.
BIDENSIFY_API int32_t bidensify_check(const char* path, char* error, size_t error_size);
// Checks, and loads the method `forward` of a .pte, or returns null; `error` then says why.
BIDENSIFY_API bidensify_net* bidensify_open(const char* path, char* error, size_t error_size);
BIDENSIFY_API void bidensify_close(bidensify_net* net);
// Numbers of inputs and outputs.
BIDENSIFY_API int32_t bidensify_counts(bidensify_net* net, int32_t* inputs, int32_t* outputs);
// Sizes and dtype of input i at its largest; `data` stays as it was.
BIDENSIFY_API int32_t bidensify_input(bidensify_net* net, int32_t i, bidensify_tensor* out);
// Runs; returns 0, or `error` says why not.
BIDENSIFY_API int32_t bidensify_run(bidensify_net* net, const bidensify_tensor* inputs, int32_t count, char* error,
                                    size_t error_size);
// Output i of the last run, copied contiguously into out->data where that has room for out->bytes; out->bytes is what it needs.
BIDENSIFY_API int32_t bidensify_output(bidensify_net* net, int32_t i, bidensify_tensor* out);
// Numbers that stand beside the network (image_mean, image_std): up to `room` of them; returns how many there are, -1 for none.
BIDENSIFY_API int32_t bidensify_constant(bidensify_net* net, const char* name, double* values, int32_t room);
// Of ExecuTorch's pool, for all programs of this process; 0 leaves it as it is. Returns the number. Call it before a program is
// loaded: XNNPACK keeps the threads that were there then.
BIDENSIFY_API int32_t bidensify_threads(int32_t wanted);

#ifdef __cplusplus
}
#endif
#endif
