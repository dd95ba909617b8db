// bidensify::packed_layer.out for ExecuTorch, over the kernels of this library. Loading the library registers it.
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include "call.h"
#include "refusal.h"

namespace bidensify {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

// What EXECUTORCH_LIBRARY makes of a typed function ends the process where a program holds other types than the schema's:
// the arguments are taken out here, so that a damaged file is refused.
enum Argument { kParts, kUp, kTiles, kSide, kSpec, kThresholds, kLevels, kResidual, kOut, kArguments };

bool view(const Tensor& tensor, const char* what, View& out, Message& why) {
  if (tensor.dim() > kMostDims) return why.say("%s has %d dimensions", what, (int)tensor.dim());
  switch (tensor.scalar_type()) {
    case ScalarType::Float: out.type = Type::kFloat32; break;
    case ScalarType::BFloat16: out.type = Type::kBFloat16; break;
    case ScalarType::Int: out.type = Type::kInt32; break;
    default: out.type = Type::kOther;
  }
  out.data = tensor.const_data_ptr();
  out.dims = (int)tensor.dim();
  // A dimension of one is anywhere.
  int64_t running = 1;
  bool plain = true;
  for (int i = out.dims - 1; i >= 0; --i) {
    out.sizes[i] = tensor.size(i);
    plain = plain && (out.sizes[i] == 1 || tensor.strides()[i] == running);
    running *= out.sizes[i];
  }
  out.plain = plain;
  if (out.dims == 4) {
    const int order[] = {1, 3, 2, 0};
    bool last = true;
    running = 1;
    for (int i : order) {
      last = last && (out.sizes[i] == 1 || tensor.strides()[i] == running);
      running *= out.sizes[i];
    }
    out.last = last;
  }
  if (out.data == nullptr && running != 0) return why.say("%s has no memory", what);
  return true;
}

bool view(const EValue& value, const char* what, View& out, Message& why) {
  if (!value.isTensor()) return why.say("%s is no tensor", what);
  return view(value.toTensor(), what, out, why);
}

bool optional(const EValue& value, const char* what, View& out, Message& why) {
  return value.isNone() || view(value, what, out, why);
}

bool read(Span<EValue*> stack, Arguments& a, Message& why) {
  if (stack.size() < kArguments) return why.say("%zu arguments; the operator takes %d", stack.size(), (int)kArguments);
  if (!stack[kParts]->isTensorList() || !stack[kUp]->isIntList() || !stack[kSpec]->isIntList())
    return why.say("parts, up and spec are not a list of tensors and two lists of integers");
  const auto parts = stack[kParts]->toTensorList();
  const auto up = stack[kUp]->toIntList(), spec = stack[kSpec]->toIntList();
  if (parts.size() > (size_t)kMostParts) return why.say("%zu parts; there are at most %d", parts.size(), kMostParts);
  a.part_count = parts.size();
  for (size_t i = 0; i < parts.size(); ++i)
    if (!view(parts[i], "a part", a.parts[i], why)) return false;
  a.up = up.data(), a.up_count = up.size();
  a.spec = spec.data(), a.spec_count = spec.size();
  return view(*stack[kTiles], "tiles", a.tiles, why) && view(*stack[kSide], "side", a.side, why) &&
         optional(*stack[kThresholds], "thresholds", a.thresholds, why) && optional(*stack[kLevels], "levels", a.levels, why) &&
         optional(*stack[kResidual], "residual", a.residual, why);
}

// ExecuTorch's threads in the place of OpenMP's: as many calls of `body` as threads.
void parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  executorch::extension::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(data);
  });
}

Error run(Span<EValue*> stack, Message& why) {
  Arguments arguments;
  Call call;
  int32_t tier;
  if (!read(stack, arguments, why) || !call.prepare(arguments, why) || !choose_tier(&tier, why)) return Error::InvalidArgument;
  if (!stack[kOut]->isTensor()) {
    why.say("out is no tensor");
    return Error::InvalidArgument;
  }
  Tensor& out = stack[kOut]->toTensor();
  executorch::aten::SizesType sizes[kMostDims];
  for (int i = 0; i < call.dims(); ++i) sizes[i] = (executorch::aten::SizesType)call.sizes()[i];
  if (out.dim() != call.dims() || executorch::runtime::resize_tensor(out, {sizes, (size_t)call.dims()}) != Error::Ok) {
    why.say("the output of %lld x ... x %lld does not fit what the program planned for it: export it for larger images",
            (long long)call.sizes()[0], (long long)call.sizes()[call.dims() - 1]);
    return Error::InvalidArgument;
  }
  View y;
  if (!view(out, "out", y, why)) return Error::InvalidArgument;
  if (y.type != call.type() || !(call.plain() ? y.plain : y.last)) {
    why.say("out has another dtype than the input, or does not lie in %s", call.plain() ? "order" : "channels_last");
    return Error::InvalidArgument;
  }
  const int32_t threads = (int32_t)executorch::extension::get_thread_count();
  return call.run(out.mutable_data_ptr(), tier, threads, why) ? Error::Ok : Error::InvalidArgument;
}

void boxed(KernelRuntimeContext& context, Span<EValue*> stack) {
  Message why;
  const Error error = run(stack, why);
  if (error == Error::Ok) return;
  refuse(why.text);
  context.fail(error);
}

const auto registered = [] {
  bd_set_parallel(parallel);
  return executorch::runtime::register_kernel(executorch::runtime::Kernel("bidensify::packed_layer.out", boxed));
}();

}  // namespace
}  // namespace bidensify
