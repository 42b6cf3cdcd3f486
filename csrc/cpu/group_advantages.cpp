// Group-relative advantages in double: a few kilobytes, in one thread. Nothing here gains from wider vectors.
#ifdef R1FAST_BUILD_OPERATOR

#include "../operator.h"

#include <cmath>
#include <numeric>
#include <string_view>

namespace r1fast {
namespace {

double unbiased_std(double sum_of_squares, int64_t count) {
  return std::sqrt(sum_of_squares / static_cast<double>(std::max<int64_t>(count - 1, 1)));
}

// scale: "group", "batch" or "none". NaN = unscorable: it touches nobody's mean, and its advantage is 0.
void write_advantages(double* advantages, const double* rewards, const int64_t* group_ids, int64_t num_samples,
                      std::string_view scale, double eps) {
  std::vector<int64_t> order(num_samples);
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int64_t n) { return std::isnan(rewards[n]); });
  // Stable: within a group, sums run in the order of the samples.
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group_ids[a] < group_ids[b]; });

  double batch_std = 0;
  if (scale == "batch") {
    double sum = 0, squares = 0;
    for (const int64_t n : order) {
      sum += rewards[n];
    }
    const double mean = sum / static_cast<double>(order.size());
    for (const int64_t n : order) {
      squares += (rewards[n] - mean) * (rewards[n] - mean);
    }
    batch_std = unbiased_std(squares, static_cast<int64_t>(order.size()));
  }

  for (auto begin = order.begin(), end = begin; begin != order.end(); begin = end) {
    end = std::find_if(begin, order.end(), [&](int64_t n) { return group_ids[n] != group_ids[*begin]; });
    // Measured from one of the group, equal rewards are exactly 0, and so are their advantages.
    const double origin = rewards[*begin];
    double sum = 0, squares = 0;
    std::for_each(begin, end, [&](int64_t n) { sum += rewards[n] - origin; });
    const double mean = sum / static_cast<double>(end - begin);
    for (auto n = begin; n != end; ++n) {
      advantages[*n] = (rewards[*n] - origin) - mean;
      squares += advantages[*n] * advantages[*n];
    }
    if (scale != "none") {
      const double divisor = eps + (scale == "batch" ? batch_std : unbiased_std(squares, end - begin));
      std::for_each(begin, end, [&](int64_t n) { advantages[n] /= divisor; });
    }
  }
}

}  // namespace

at::Tensor group_advantages(const at::Tensor& rewards_N, const at::Tensor& group_ids_N, std::string scale, double eps) {
  TORCH_CHECK_VALUE(
      rewards_N.dim() == 1 && group_ids_N.sizes() == rewards_N.sizes(), "group_advantages: got rewards ",
      rewards_N.sizes(), " and group ids ", group_ids_N.sizes(), ", expected both [N]");
  const at::Tensor rewards = rewards_N.to(at::kDouble).contiguous();
  const at::Tensor group_ids = group_ids_N.to(at::kLong).contiguous();
  at::Tensor out = at::zeros({rewards.numel()}, rewards.options());
  write_advantages(out.mutable_data_ptr<double>(), rewards.const_data_ptr<double>(),
                   group_ids.const_data_ptr<int64_t>(), rewards.numel(), scale, eps);
  return out.to(computed_in(rewards_N.scalar_type()));
}

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("group_advantages", &group_advantages);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
