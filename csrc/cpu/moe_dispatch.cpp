// A stable counting sort of the choices by expert, chunk by chunk: counts of each, starts by expert and then by chunk,
// and each choice to its place. Chunks have a fixed size, and places are integers: nothing depends on the threads.
#ifdef R1FAST_BUILD_OPERATOR

#include "../moe.h"

#include <algorithm>
#include <limits>

namespace r1fast {

constexpr int64_t kChunk = 16384;

std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert(
    const char* op, const at::Tensor& expert_ids_TK, int64_t num_experts) {
  check_tensor(op, "expert_ids_TK", expert_ids_TK, at::kLong, {-1, -1});
  const int64_t num_choices = expert_ids_TK.numel();
  TORCH_CHECK_VALUE(
      num_choices <= std::numeric_limits<int32_t>::max(), op, ": got ", num_choices,
      " choices, expected at most 2^31 - 1: call it for fewer tokens");
  const at::Tensor ids = expert_ids_TK.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const auto options = ids.options().dtype(at::kInt);
  at::Tensor order_M = at::empty({num_choices}, options), slot_TK = at::empty(ids.sizes(), options);
  at::Tensor offsets_E = at::empty({num_experts}, options);
  const int64_t num_chunks = (num_choices + kChunk - 1) / kChunk;
  const int64_t num_bins = num_experts + 1;  // the last one for those that are skipped
  std::vector<int32_t> places(num_chunks * num_bins, 0);  // counts, then where the next choice of a chunk goes
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < std::min(end * kChunk, num_choices); ++i) {
      TORCH_CHECK_VALUE(
          id[i] >= 0, op, ": expert_ids_TK[", i / ids.size(1), ", ", i % ids.size(1), "] is ", id[i],
          ", expected an id >= 0; ids from ", num_experts, " on are skipped");
      ++places[i / kChunk * num_bins + std::min(id[i], num_experts)];
    }
  });
  int32_t start = 0;
  for (int64_t bin = 0; bin < num_bins; ++bin) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int32_t count = places[chunk * num_bins + bin];
      places[chunk * num_bins + bin] = start;
      start += count;
    }
    if (bin < num_experts) {
      offsets_E.mutable_data_ptr<int32_t>()[bin] = start;
    }
  }
  int32_t* order = order_M.mutable_data_ptr<int32_t>();
  int32_t* slot = slot_TK.mutable_data_ptr<int32_t>();
  at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kChunk; i < std::min(end * kChunk, num_choices); ++i) {
      const int32_t place = places[i / kChunk * num_bins + std::min(id[i], num_experts)]++;
      order[place] = static_cast<int32_t>(i);
      slot[i] = place;
    }
  });
  return {order_M, slot_TK, offsets_E};
}

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("moe_dispatch", [](const at::Tensor& expert_ids_TK, int64_t num_experts) {
    return sort_by_expert("moe_dispatch", expert_ids_TK, num_experts);
  });
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
