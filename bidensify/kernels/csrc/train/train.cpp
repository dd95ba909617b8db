// Chooses the instruction set and checks what comes from outside.
#include "train.h"

#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "tier.h"

namespace {

struct Choice {
  const bdt::Tier* tier;
  const bdt::Evaluation* evaluation;
  const char* name;
};

// What was built and runs here, fastest first.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> found = [] {
    std::vector<Choice> all;
#if defined(BDT_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
      all.push_back({bdt::avx512_tier(), bdt::avx512_evaluation(), "avx512"});
#endif
#if defined(BDT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      all.push_back({bdt::avx2_tier(), bdt::avx2_evaluation(), "avx2"});
#endif
    all.push_back({bdt::portable_tier(), bdt::portable_evaluation(), "portable"});
    return all;
  }();
  return found;
}

std::atomic<int> chosen{0};

const Choice& choice() { return choices()[chosen.load(std::memory_order_relaxed)]; }

template <class F>
int32_t guarded(F f) {
  try {
    f(choice());
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

bool bad(const bdt_shape* s) { return s == nullptr || s->n < 1 || s->c < 1 || s->s < 1 || s->threads < 1; }

}  // namespace


const char* bdt_instruction_set(void) { return choice().name; }

int32_t bdt_use(const char* name) {
  for (size_t i = 0; i < choices().size(); ++i)
    if (std::strcmp(choices()[i].name, name) == 0) {
      chosen.store((int)i);
      return 0;
    }
  return 1;
}

int32_t bdt_dab_forward(const bdt_shape* shape, const bdt_dab* args) {
  if (bad(shape) || args->groups < 0 || args->groups > shape->c) return 1;
  return guarded([&](const Choice& c) { c.tier->dab_forward(*shape, *args); });
}

int32_t bdt_dab_again(const bdt_shape* shape, const bdt_dab* args) {
  if (bad(shape)) return 1;
  return guarded([&](const Choice& c) { c.tier->dab_again(*shape, *args); });
}

int32_t bdt_dab_backward(const bdt_shape* shape, const bdt_dab_grad* args) {
  if (bad(shape) || args->groups < 0 || args->groups > shape->c) return 1;
  return guarded([&](const Choice& c) { c.tier->dab_backward(*shape, *args); });
}

int32_t bdt_moments(const bdt_shape* shape, const void* x, float* mean, float* variance) {
  if (bad(shape)) return 1;
  return guarded([&](const Choice& c) { c.tier->moments(*shape, x, mean, variance); });
}

int32_t bdt_post_forward(const bdt_shape* shape, const bdt_post* args) {
  if (bad(shape)) return 1;
  return guarded([&](const Choice& c) { c.tier->post_forward(*shape, *args); });
}

int32_t bdt_post_backward(const bdt_shape* shape, const bdt_post_grad* args) {
  if (bad(shape)) return 1;
  return guarded([&](const Choice& c) { c.tier->post_backward(*shape, *args); });
}

int32_t bdt_weight_forward(int64_t rows, int64_t columns, int32_t threads, const float* w, int32_t measure, float* scale,
                           float* y) {
  if (rows < 1 || columns < 1 || threads < 1) return 1;
  return guarded([&](const Choice& c) { c.tier->weight_forward(rows, columns, threads, w, measure != 0, scale, y); });
}

int32_t bdt_weight_backward(int64_t rows, int64_t columns, int32_t threads, const float* w, const float* scale,
                            const float* grad, float* grad_w) {
  if (rows < 1 || columns < 1 || threads < 1) return 1;
  return guarded([&](const Choice& c) { c.tier->weight_backward(rows, columns, threads, w, scale, grad, grad_w); });
}

int32_t bdt_eval_codes(const bdt_shape* shape, const bdt_codes* args) {
  if (bad(shape) || !shape->last || args->planes < 1 || args->planes > 2) return 1;
  return guarded([&](const Choice& c) { c.evaluation->codes(*shape, *args); });
}

int32_t bdt_eval_finish(const bdt_shape* shape, const bdt_finish* args) {
  if (bad(shape) || !shape->last) return 1;
  return guarded([&](const Choice& c) { c.evaluation->finish(*shape, *args); });
}

int32_t bdt_eval_signs(int64_t rows, int64_t columns, int32_t threads, const float* w, float* scale, float* y) {
  if (rows < 1 || columns < 1 || threads < 1) return 1;
  return guarded([&](const Choice& c) { c.evaluation->signs(rows, columns, threads, w, scale, y); });
}
