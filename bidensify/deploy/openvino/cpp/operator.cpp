// bidensify::packed_layer as an operator of OpenVINO, over the kernels of this library: core.add_extension loads it.
//
// It differs from the schema of bidensify/deploy/operator.py in what OpenVINO can hold: images are (N, H, W, C), one after another in
// memory as the kernels read and write them, so that no layout is left to the plugin; integers are attributes; and `given` says
// which of thresholds (1), levels (2) and residual (4) stand behind parts, tiles and side among the inputs.
#include <stdio.h>

#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/op/op.hpp>
#include <vector>

#include "call.h"

namespace bidensify {
namespace {

constexpr int64_t kThresholds = 1, kLevels = 2, kResidual = 4, kAll = 7;

// OpenVINO's threads in the place of OpenMP's: as many calls of `body` as threads.
void parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  ov::parallel_for((size_t)threads, [&](size_t) { body(data); });
}

// What kernels see of a tensor whose images are (N, H, W, C).
bool view(const ov::Shape& shape, ov::element::Type type, const void* data, bool dense, const char* what, bool image, View& out,
          Message& why) {
  if (shape.size() > (size_t)kMostDims) return why.say("%s has %zu dimensions", what, shape.size());
  out.type = type == ov::element::f32    ? Type::kFloat32
             : type == ov::element::bf16 ? Type::kBFloat16
             : type == ov::element::i32  ? Type::kInt32
                                         : Type::kOther;
  out.data = data;
  out.dims = (int)shape.size();
  for (int i = 0; i < out.dims; ++i) out.sizes[i] = (int64_t)shape[(size_t)i];
  if (out.data == nullptr && ov::shape_size(shape) != 0) return why.say("%s has no memory", what);
  if (image && out.dims == 4) {
    const int64_t h = out.sizes[1], w = out.sizes[2], c = out.sizes[3];
    out.sizes[1] = c, out.sizes[2] = h, out.sizes[3] = w;
    out.last = dense;
  } else {
    out.plain = dense;
  }
  return true;
}

ov::Dimension grown(const ov::Dimension& size, int64_t times) { return size * ov::Dimension(times); }

}  // namespace

class PackedLayer : public ov::op::Op {
 public:
  OPENVINO_OP("packed_layer", "bidensify");

  PackedLayer() = default;
  PackedLayer(const ov::OutputVector& inputs, std::vector<int64_t> up, std::vector<int64_t> spec, int64_t given)
      : Op(inputs), up_(std::move(up)), ints_(std::move(spec)), given_(given) {
    constructor_validate_and_infer_types();
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("up", up_);
    visitor.on_attribute("spec", ints_);
    visitor.on_attribute("given", given_);
    return true;
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<PackedLayer>(inputs, up_, ints_, given_);
  }

  // What shapes and types alone tell is refused here, when a network is read; the rest when a layer runs.
  void validate_and_infer_types() override {
    Message why;
    Spec spec;
    int32_t tier;
    const bool good = spec.read(ints_.data(), ints_.size(), why) && counted(why) && choose_tier(&tier, why);
    NODE_VALIDATION_CHECK(this, good, why.text);
    const bool linear = spec.kind == Spec::kLinear;
    const ov::PartialShape first = get_input_partial_shape(0);
    if (first.rank().is_dynamic()) {
      set_output_type(0, get_input_element_type(0), linear ? ov::PartialShape::dynamic() : ov::PartialShape::dynamic(4));
      return;
    }
    NODE_VALIDATION_CHECK(this, linear ? first.size() >= 2 : first.size() == 4, "an input of shape ", first);
    ov::PartialShape out = first;
    out[out.size() - 1] = spec.out_channels;
    if (!linear) {
      ov::Dimension sizes[2] = {grown(first[1], up_[0]), grown(first[2], up_[0])};
      for (size_t i = 1; i < up_.size(); ++i) {
        const ov::PartialShape part = get_input_partial_shape(i);
        if (part.rank().is_dynamic()) continue;
        const bool fits = part.size() == 4 && ov::Dimension::merge(sizes[0], sizes[0], grown(part[1], up_[i])) &&
                          ov::Dimension::merge(sizes[1], sizes[1], grown(part[2], up_[i]));
        NODE_VALIDATION_CHECK(this, fits, "part ", i, " of shape ", part, ", upsampled ", up_[i], " times, does not fit ", first);
      }
      for (int axis = 0; axis < 2; ++axis) {
        out[(size_t)axis + 1] = ov::Dimension::dynamic();
        if (sizes[axis].is_dynamic()) continue;
        const int64_t length = sizes[axis].get_length(), size[2] = {length, length};
        int64_t result[2];
        NODE_VALIDATION_CHECK(this, length >= 1 && length < 1 << 30, "an input of size ", length);
        spec.output_size(size, result);
        NODE_VALIDATION_CHECK(this, result[axis] >= 1, "an input of size ", length, " gives an output of ", result[axis]);
        out[(size_t)axis + 1] = result[axis];
      }
    }
    set_output_type(0, get_input_element_type(0), out);
    NODE_VALIDATION_CHECK(this, fits(why), why.text);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    Message why;
    if (run(outputs, inputs, why)) return true;
    // OpenVINO 2026.4 drops what is thrown here where `infer` runs on one thread, the caller's, and hands out whatever the
    // memory held; `start_async` and `wait` throw it.
    fprintf(stderr, "bidensify::packed_layer %s: %s\n", get_friendly_name().c_str(), why.text);
    OPENVINO_THROW("bidensify::packed_layer ", get_friendly_name(), ": ", why.text);
  }

 private:
  bool counted(Message& why) const {
    if (up_.empty() || up_.size() > (size_t)kMostParts)
      return why.say("%zu parts; there are 1 to %d", up_.size(), kMostParts);
    for (int64_t times : up_)
      if (times < 1 || times > 1 << 24) return why.say("a part is upsampled %lld times", (long long)times);
    if (given_ < 0 || given_ > kAll) return why.say("given=%lld is not within 0..7", (long long)given_);
    const size_t wanted = up_.size() + 2 + !!(given_ & kThresholds) + !!(given_ & kLevels) + !!(given_ & kResidual);
    if (get_input_size() != wanted) return why.say("%zu inputs; there must be %zu", get_input_size(), wanted);
    return true;
  }

  // The operator's arguments, of inputs in a row; `made` fills one: what(index, name, is an image, the view).
  template <class Made>
  bool arguments(Arguments& a, Made made) const {
    const bool image = ints_.size() > 1 && ints_[1] != Spec::kLinear;
    a.part_count = up_.size(), a.up = up_.data(), a.up_count = up_.size(), a.spec = ints_.data(), a.spec_count = ints_.size();
    size_t at = 0;
    for (; at < up_.size(); ++at)
      if (!made(at, "a part", image, a.parts[at])) return false;
    return made(at++, "tiles", false, a.tiles) && made(at++, "side", false, a.side) &&
           (!(given_ & kThresholds) || made(at++, "thresholds", false, a.thresholds)) &&
           (!(given_ & kLevels) || made(at++, "levels", false, a.levels)) &&
           (!(given_ & kResidual) || made(at++, "residual", image, a.residual));
  }

  // Whether shapes and types fit one another, as far as they are known.
  bool fits(Message& why) const {
    static const char memory = 0;
    bool known = true;
    Arguments a;
    const auto made = [&](size_t at, const char* what, bool image, View& out) {
      const ov::PartialShape& shape = get_input_partial_shape(at);
      const ov::element::Type type = get_input_element_type(at);
      known = known && shape.is_static() && type.is_static();
      return !known || view(shape.to_shape(), type, &memory, true, what, image, out, why);
    };
    if (!arguments(a, made)) return false;
    Call call;
    return !known || call.prepare(a, why);
  }

  bool run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Message& why) const {
    if (!counted(why)) return false;
    if (inputs.size() != get_input_size() || outputs.size() != 1)
      return why.say("%zu inputs and %zu outputs", inputs.size(), outputs.size());
    const auto seen = [&](const ov::Tensor& tensor, const char* what, bool image, View& out) {
      return view(tensor.get_shape(), tensor.get_element_type(), tensor.data(), tensor.is_continuous(), what, image, out, why);
    };
    Arguments a;
    const auto made = [&](size_t at, const char* what, bool image, View& out) { return seen(inputs[at], what, image, out); };
    if (!arguments(a, made)) return false;
    Call call;
    int32_t tier;
    if (!call.prepare(a, why) || !choose_tier(&tier, why)) return false;
    // Images are (N, H, W, C) here whatever the spec says, and called by their usual order in `call`.
    if (call.plain() != call.linear()) return why.say("a spec that says where channels are; under OpenVINO they are the last dimension");
    const int64_t* const sizes = call.sizes();
    ov::Shape shape(sizes, sizes + call.dims());
    if (!call.linear()) shape = {(size_t)sizes[0], (size_t)sizes[2], (size_t)sizes[3], (size_t)sizes[1]};
    outputs[0].set_shape(shape);
    View y;
    if (!seen(outputs[0], "the output", !call.linear(), y)) return false;
    if (y.type != call.type() || !(call.linear() ? y.plain : y.last)) return why.say("the output has another dtype than the input, or gaps");
    return call.run(outputs[0].data(), tier, parallel_get_max_threads(), why);
  }

  std::vector<int64_t> up_, ints_;
  int64_t given_ = 0;
};

}  // namespace bidensify

static const bool started = [] {
  bd_set_parallel(bidensify::parallel);
  return true;
}();

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<bidensify::PackedLayer>>()}));
