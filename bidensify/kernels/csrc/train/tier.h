// The table of kernels that each instruction set fills in.
#ifndef BIDENSIFY_TRAIN_TIER_H
#define BIDENSIFY_TRAIN_TIER_H

#include "train.h"

namespace bdt {

struct Tier {
  void (*dab_forward)(const bdt_shape&, const bdt_dab&);
  void (*dab_again)(const bdt_shape&, const bdt_dab&);
  void (*dab_backward)(const bdt_shape&, const bdt_dab_grad&);
  void (*moments)(const bdt_shape&, const void*, float*, float*);
  void (*post_forward)(const bdt_shape&, const bdt_post&);
  void (*post_backward)(const bdt_shape&, const bdt_post_grad&);
  void (*weight_forward)(int64_t, int64_t, int, const float*, bool, float*, float*);
  void (*weight_backward)(int64_t, int64_t, int, const float*, const float*, const float*, float*);
};

struct Evaluation {
  void (*codes)(const bdt_shape&, const bdt_codes&);
  void (*finish)(const bdt_shape&, const bdt_finish&);
  void (*signs)(int64_t, int64_t, int, const float*, float*, float*);
};

const Tier* portable_tier();
const Tier* avx2_tier();
const Tier* avx512_tier();
const Evaluation* portable_evaluation();
const Evaluation* avx2_evaluation();
const Evaluation* avx512_evaluation();

}  // namespace bdt
#endif
