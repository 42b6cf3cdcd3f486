// Expert selection on scores (cpu/route_topk.cpp).
#pragma once

#include "simd.h"

namespace r1fast {

struct RouteArgs {
  at::ScalarType dtype;
  const void* scores;  // [T, E]
  const void* bias;    // [E], or null
  int64_t num_experts, top_k, n_group, topk_group;
  bool norm_topk_prob;
  double scale;
  bool replays;   // the ids are given
  int64_t* ids;   // [T, K]
  void* weights;  // [T, K]
};

R1FAST_DECLARE(route_tokens, RouteArgs);

}  // namespace r1fast
