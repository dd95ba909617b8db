#include "runner.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>
#include <executorch/runtime/platform/log.h>
#include <stdio.h>
#include <string.h>

#include <new>
#include <string>
#include <vector>

#include "digest.h"
#include "refusal.h"

// Of a header that ExecuTorch's wheel leaves out; the library that it ships has them.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t new_thread_count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace bidensify {
namespace {
thread_local char kept[400];
}

void refuse(const char* what) {
  snprintf(kept, sizeof kept, "%s", what);
  ET_LOG(Error, "bidensify::packed_layer: %s", what);
}
const char* last_refusal() { return kept; }
void forget_refusal() { kept[0] = 0; }

}  // namespace bidensify

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;

struct bidensify_net {
  Module module;
  std::vector<EValue> outputs;
  explicit bidensify_net(const char* path) : module(path, Module::LoadMode::Mmap) {}
};

namespace {

int32_t fail(char* error, size_t size, const char* what, Error code) {
  const char* why = bidensify::last_refusal();
  if (error && size)
    snprintf(error, size, "%s: %s%s%s", what, executorch::runtime::to_string(code), why[0] ? "; packed_layer: " : "", why);
  return 1;
}

int64_t element(ScalarType type) {
  switch (type) {
    case ScalarType::Float: case ScalarType::Int: return 4;
    case ScalarType::Long: case ScalarType::Double: return 8;
    case ScalarType::BFloat16: case ScalarType::Half: case ScalarType::Short: return 2;
    case ScalarType::Byte: case ScalarType::Char: case ScalarType::Bool: return 1;
    default: return 0;
  }
}

// Copies a tensor that lies in whatever order of dimensions as one that lies plainly.
void copy_plain(const executorch::aten::Tensor& from, int64_t size, char* to) {
  const int dims = (int)from.dim();
  const char* data = static_cast<const char*>(from.const_data_ptr());
  int64_t at[16] = {};
  const int64_t count = from.numel(), inner = dims ? from.size(dims - 1) : 1, step = dims ? from.strides()[dims - 1] : 0;
  for (int64_t done = 0; done < count; done += inner) {
    int64_t start = 0;
    for (int i = 0; i + 1 < dims; ++i) start += at[i] * from.strides()[i];
    if (step == 1) {
      memcpy(to + done * size, data + start * size, (size_t)(inner * size));
    } else {
      for (int64_t i = 0; i < inner; ++i) memcpy(to + (done + i) * size, data + (start + i * step) * size, (size_t)size);
    }
    for (int i = dims - 2; i >= 0 && ++at[i] == from.size(i); --i) at[i] = 0;
  }
}

}  // namespace

extern "C" {

int32_t bidensify_check(const char* path, char* error, size_t error_size) {
  FILE* const file = fopen(path, "rb");
  const bool good = file != nullptr && bidensify::sealed(file);
  const char* const why = file == nullptr ? "cannot be read" : "was cut, edited or damaged, or is not of `bidensify export`; export it again";
  if (file != nullptr) fclose(file);
  if (!good && error && error_size) snprintf(error, error_size, "%s %s", path, why);
  return good ? 0 : 1;
}

bidensify_net* bidensify_open(const char* path, char* error, size_t error_size) {
  bidensify::forget_refusal();
  if (bidensify_check(path, error, error_size) != 0) return nullptr;
  bidensify_net* net = new (std::nothrow) bidensify_net(path);
  if (net == nullptr) return nullptr;
  Error code = net->module.load(executorch::runtime::Program::Verification::InternalConsistency);
  if (code == Error::Ok) code = net->module.load_forward();
  if (code == Error::Ok) return net;
  const std::string what = std::string(path) + " is no program that this runtime runs (damaged, of a newer version, or with an operator it lacks)";
  fail(error, error_size, what.c_str(), code);
  delete net;
  return nullptr;
}

void bidensify_close(bidensify_net* net) { delete net; }

int32_t bidensify_counts(bidensify_net* net, int32_t* inputs, int32_t* outputs) {
  const auto meta = net->module.method_meta("forward");
  if (!meta.ok()) return 1;
  *inputs = (int32_t)meta->num_inputs();
  *outputs = (int32_t)meta->num_outputs();
  return 0;
}

int32_t bidensify_input(bidensify_net* net, int32_t i, bidensify_tensor* out) {
  const auto meta = net->module.method_meta("forward");
  if (!meta.ok()) return 1;
  const auto tensor = meta->input_tensor_meta((size_t)i);
  if (!tensor.ok() || tensor->sizes().size() > 16) return 1;
  out->dtype = (int32_t)tensor->scalar_type();
  out->dims = (int32_t)tensor->sizes().size();
  for (int32_t d = 0; d < out->dims; ++d) out->sizes[d] = tensor->sizes()[(size_t)d];
  out->bytes = (int64_t)tensor->nbytes();
  return 0;
}

int32_t bidensify_run(bidensify_net* net, const bidensify_tensor* inputs, int32_t count, char* error, size_t error_size) {
  bidensify::forget_refusal();
  net->outputs.clear();
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> values;
  for (int32_t i = 0; i < count; ++i) {
    const bidensify_tensor& given = inputs[i];
    if (given.dims < 0 || given.dims > 16) return fail(error, error_size, "an input has too many dimensions", Error::InvalidArgument);
    int64_t bytes = element((ScalarType)given.dtype);
    for (int32_t d = 0; d < given.dims; ++d)
      if (given.sizes[d] < 0 || __builtin_mul_overflow(bytes, (int64_t)given.sizes[d], &bytes))
        return fail(error, error_size, "an input's size is none", Error::InvalidArgument);
    if (element((ScalarType)given.dtype) == 0 || bytes != given.bytes)
      return fail(error, error_size, "an input's bytes are not its sizes times its dtype", Error::InvalidArgument);
    tensors.push_back(executorch::extension::from_blob(given.data, std::vector<SizesType>(given.sizes, given.sizes + given.dims),
                                                       (ScalarType)given.dtype));
    values.push_back(EValue(*tensors.back()));
  }
  auto result = net->module.forward(values);
  if (!result.ok()) return fail(error, error_size, "the program did not run on these inputs", result.error());
  net->outputs = std::move(result.get());
  return 0;
}

int32_t bidensify_output(bidensify_net* net, int32_t i, bidensify_tensor* out) {
  if (i < 0 || (size_t)i >= net->outputs.size() || !net->outputs[(size_t)i].isTensor()) return 1;
  const auto& tensor = net->outputs[(size_t)i].toTensor();
  const int64_t room = out->bytes;
  out->dtype = (int32_t)tensor.scalar_type();
  out->dims = (int32_t)tensor.dim();
  if (out->dims > 16) return 1;
  for (int32_t d = 0; d < out->dims; ++d) out->sizes[d] = tensor.size(d);
  const int64_t size = element(tensor.scalar_type());
  out->bytes = tensor.numel() * size;
  if (out->data != nullptr) {
    if (room < out->bytes || size == 0) return 1;
    copy_plain(tensor, size, static_cast<char*>(out->data));
  }
  return 0;
}

int32_t bidensify_constant(bidensify_net* net, const char* name, double* values, int32_t room) {
  const auto names = net->module.method_names();
  if (!names.ok() || names->count(name) == 0 || strcmp(name, "forward") == 0) return -1;
  const auto result = net->module.execute(name);
  if (!result.ok()) return -1;
  int32_t i = 0;
  for (const EValue& value : *result) {
    if (!value.isDouble()) return -1;
    if (i < room) values[i] = value.toDouble();
    ++i;
  }
  return i;
}

int32_t bidensify_threads(int32_t wanted) {
  auto* pool = wanted > 0 ? executorch::extension::threadpool::get_threadpool() : nullptr;
  if (pool != nullptr && executorch::extension::get_thread_count() != wanted) pool->_unsafe_reset_threadpool((uint32_t)wanted);
  return (int32_t)executorch::extension::get_thread_count();
}

}  // extern "C"
