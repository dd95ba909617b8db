// One call of the operator on plain memory: everything is looked at before a kernel reads it. Knows no ExecuTorch.
#ifndef BIDENSIFY_CALL_H
#define BIDENSIFY_CALL_H

#include <stddef.h>
#include <stdint.h>

#include "bidensify_kernels.h"
#include "spec.h"

namespace bidensify {

constexpr int kMostDims = 16;
constexpr int kMostParts = 64;

enum class Type { kFloat32, kBFloat16, kInt32, kOther };

// A tensor somewhere. `last`: (N, C, H, W) that lies as channels_last; `plain`: lies in the order of its dimensions. A layer reads
// images of either order, and turns those that are `plain` alone.
struct View {
  const void* data = nullptr;
  Type type = Type::kOther;
  int dims = 0;
  int64_t sizes[kMostDims] = {};
  bool last = false, plain = false;
};

struct Arguments {
  View parts[kMostParts];
  size_t part_count = 0;
  const int64_t* up = nullptr;
  size_t up_count = 0;
  View tiles, side;
  const int64_t* spec = nullptr;
  size_t spec_count = 0;
  // `data` null: not given.
  View thresholds, levels, residual;
};

class Call {
 public:
  // Checks the arguments; they must outlive the call. Images whose channels are the last dimension are called by their usual one.
  bool prepare(Arguments& arguments, Message& why);
  // The output's size, dims() of them; where it is not plain() it lies as channels_last.
  bool plain() const { return linear() || (spec_.inner & Spec::kResult); }
  int dims() const { return out_dims_; }
  const int64_t* sizes() const { return out_sizes_; }
  Type type() const { return arguments_->parts[0].type; }
  bool linear() const { return spec_.kind == Spec::kLinear; }
  // Runs on one of the kernels of bd_tier into `y`, which has the size above.
  bool run(void* y, int32_t tier, int32_t threads, Message& why);

 private:
  bool read_input(Message& why);
  const Arguments* arguments_ = nullptr;
  Spec spec_;
  int out_dims_ = 0;
  int64_t out_sizes_[kMostDims] = {};
  int64_t n_ = 0, size_[2] = {}, out_[2] = {};
};

// The best kernel of this processor, or the one that the environment variable BIDENSIFY_KERNEL names.
bool choose_tier(int32_t* tier, Message& why);

}  // namespace bidensify
#endif
