// The weights of a layer, as decode_layers.h reads them.
#pragma once

#include <cstdint>

namespace r1fast {

// What a layer may have, in this order (kernels/r1fast_kernels/decode_layers.py: NAMES).
enum Name {
  kAttentionNorm, kMlpNorm, kQ, kQBias, kK, kKBias, kV, kVBias, kO, kOBias, kQHeadNorm, kKHeadNorm, kQA, kQABias,
  kQANorm, kQB, kKvA, kKvABias, kKvANorm, kKvB, kGate, kGateBias, kUp, kUpBias, kDown, kDownBias, kSharedGate,
  kSharedUp, kSharedDown, kRouter, kRouterBias, kExpertGateUp, kExpertDown, kNumNames
};

struct Weight {
  const void* data = nullptr;       // [outputs, inputs], of experts the first, and the others follow; null: there is none
  int64_t outputs = 0, inputs = 0;  // of a matrix
};

struct LayerArgs {
  Weight weights[kNumNames];
  void *keys, *values;  // [slots, K, d]; latents [slots, 1, C + R] and null

  const Weight& operator[](Name name) const { return weights[name]; }
  bool has(Name name) const { return weights[name].data != nullptr; }
};

}  // namespace r1fast
