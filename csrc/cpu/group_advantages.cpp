// Group-relative advantages: a few kilobytes, in one thread. Nothing here gains from wider vectors.
#ifdef R1FAST_BUILD_OPERATOR

#include "../group_advantages.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

namespace r1fast {
namespace {

at::Tensor group_advantages_cpu(
    const at::Tensor& rewards_N, const at::Tensor& group_ids_N, std::string scale, double eps) {
  TORCH_CHECK_VALUE(
      rewards_N.dim() == 1 && group_ids_N.sizes() == rewards_N.sizes(),
      "group_advantages: got rewards ", rewards_N.sizes(), " and group ids ", group_ids_N.sizes(),
      ", expected both [N]");
  const at::Tensor rewards = rewards_N.to(at::kDouble).contiguous();
  const at::Tensor group_ids = group_ids_N.to(at::kLong).contiguous();
  const auto advantages = group_advantages(
      rewards.const_data_ptr<double>(), group_ids.const_data_ptr<int64_t>(), rewards.numel(), scale, eps);
  at::Tensor out = at::empty({rewards.numel()}, rewards.options());
  std::copy(advantages.begin(), advantages.end(), out.mutable_data_ptr<double>());
  return rewards_N.scalar_type() == at::kDouble ? out : out.to(at::kFloat);
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("group_advantages", &group_advantages_cpu);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
