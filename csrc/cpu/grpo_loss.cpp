// GRPO's loss, its gradient and its metrics in one pass over the tokens (two where the ratio is one per sample).
//
// A sample is folded by one thread in a fixed order and leaves a row of partial sums; the rows are added in order by
// one thread: the same bits for any number of threads.
#include "../simd.h"

#include <cmath>

namespace r1fast {

// Columns of the partial sums, and of the result: the loss, then kLive, then the metrics.
enum Column : int64_t {
  kLoss, kLive, kRatio, kRatioMax, kBelow, kAbove, kOutside, kKl, kGap, kGapMax, kEntropy, kColumns
};
constexpr int64_t kFirstMetric = kRatio;

// Of two, NaN when one is.
inline double largest(double a, double b) {
  return a >= b || std::isnan(a) ? a : b;
}

struct GrpoArgs {
  at::ScalarType dtype;  // of every void*: float or double
  const void* logprobs;  // [T]
  const void* old;       // [T], or null: on-policy
  const void* ref;       // [T], or null
  const void* sampler;   // [T], or null
  const void* entropy;   // [T], or null
  const bool* mask;      // [T], or null: every token counts
  const int64_t* starts;     // [N + 1]
  const int64_t* counts;     // [N], or null: as the mask says
  const double* advantages;  // [N]
  void* grad;                // [T]
  double* partials;          // [N, kColumns]
  double clip_low;
  double clip_high;  // cispo: the cap
  double delta;      // infinity: none
  double beta;
  double is_cap;
  double scale;  // of every token's loss
  bool truncated_is;
  bool cispo;
  bool sequence;
  bool sample_mean;  // divide by the tokens of the sample too
};

namespace {
inline namespace CPU_CAPABILITY {

// Vectors are summed over this many tokens, then added up in double. Three arrays of as many stay in the L1 cache.
constexpr int64_t kBlock = 1024;

template <typename acc>
struct Surrogate {
  Vec<acc> loss, slope;    // slope: d loss / d logprob, and d loss / d ln ratio where the ratio is one per sample
  Vec<acc> below, above;   // 1 where the ratio is clipped
};

template <typename acc>
inline Surrogate<acc> surrogate(const GrpoArgs& args, const Vec<acc>& ratio, const Vec<acc>& logprob, acc advantage_n) {
  using V = Vec<acc>;
  const V zero(0), one(1), advantage(advantage_n), low(args.clip_low), high(args.clip_high), delta(args.delta);
  const V positive(advantage_n > 0 ? 1 : 0), negative(advantage_n < 0 ? 1 : 0);
  if (args.cispo) {
    const V slope = (at::vec::minimum(ratio, high) * advantage).neg();
    return {slope * logprob, slope, zero, (ratio > high) & positive};
  }
  const V capped = at::vec::minimum(ratio, delta);
  const V a = capped * advantage;
  const V b = at::vec::minimum(at::vec::maximum(ratio, low), high) * advantage;
  // As autograd has it: on an edge clamp passes the gradient, and a tie of the minimum gives half to each side.
  const V a_stops = (a > b) | (ratio > delta);
  const V b_stops = (b > a) | (ratio < low) | (ratio > high);
  const V share = V::blendv(one, V(0.5), a == b);
  const V passes = V::blendv(share, zero, a_stops) + V::blendv(share, zero, b_stops);
  // A ratio of infinity that is clipped has slope 0: select, 0 times infinity is NaN.
  const V slope = V::blendv((passes * ratio * advantage).neg(), zero, passes == zero);
  return {at::vec::minimum(a, b).neg(), slope, (capped < low) & negative, (capped > high) & positive};
}

template <typename acc>
class Sample {
  using V = Vec<acc>;

 public:
  Sample(const GrpoArgs& args, int64_t n)
      : args_(args), begin_(args.starts[n]), end_(args.starts[n + 1]), row_(args.partials + n * kColumns),
        advantage_(static_cast<acc>(args.advantages[n])) {
    std::fill(row_, row_ + kColumns, 0.0);
    const int64_t live = args.mask == nullptr ? end_ - begin_ : std::count(args.mask + begin_, args.mask + end_, true);
    row_[kLive] = static_cast<double>(live);
    count_ = static_cast<double>(std::max<int64_t>(args.counts == nullptr ? live : args.counts[n], 1));
  }

  void fold() {
    if (args_.sequence) {
      fold_ratio();
    }
    for (int64_t block = begin_; block < end_; block += kBlock) {
      fold_block(block, std::min(block + kBlock, end_));
    }
    row_[kOutside] = row_[kBelow] + row_[kAbove];
    row_[kLoss] *= weight();
  }

 private:
  double weight() const { return args_.sample_mean ? args_.scale / count_ : args_.scale; }

  V live(int64_t t, int64_t size) const {
    if (args_.mask == nullptr && size == kLanes<acc>) {
      return V(0) == V(0);
    }
    acc kept[kLanes<acc>] = {};
    if (args_.mask == nullptr) {
      std::fill(kept, kept + size, acc(1));
    } else if (size == kLanes<acc>) {  // a loop of known length, without branches
      for (int64_t lane = 0; lane < kLanes<acc>; ++lane) {
        kept[lane] = static_cast<acc>(args_.mask[t + lane]);
      }
    } else {
      std::copy(args_.mask + t, args_.mask + t + size, kept);
    }
    return V::loadu(kept) != V(0);
  }

  // 0 where masked: select, whatever is there may be NaN.
  static V read(const void* values, int64_t t, int64_t size, const V& live) {
    const acc* x = static_cast<const acc*>(values) + t;
    return V::blendv(V(0), size == kLanes<acc> ? V::loadu(x) : V::loadu(x, size), live);
  }

  // exp is a call, around which vectors and constants would be spilled: a loop of its own.
  void exp_difference(const void* a, const void* b, int64_t begin, int64_t end, acc* out) const {
    for (int64_t t = begin; t < end; t += kLanes<acc>, out += kLanes<acc>) {
      const int64_t size = std::min(kLanes<acc>, end - t);
      const V keep = live(t, size);
      (read(a, t, size, keep) - read(b, t, size, keep)).exp().store(out);
    }
  }

  // The ratio of the sample from its mean log-ratio, and what each token's log-prob does to the loss through it.
  void fold_ratio() {
    const void* old_values = args_.old == nullptr ? args_.logprobs : args_.old;
    const V is_cap(static_cast<acc>(args_.is_cap));
    double log_ratio = 0, importances = args_.truncated_is ? 0 : row_[kLive];
    for (int64_t begin = begin_; begin < end_; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, end_);
      acc weights[kBlock];
      if (args_.truncated_is) {
        exp_difference(old_values, args_.sampler, begin, end, weights);
      }
      V log_ratios(0), sum(0);
      for (int64_t t = begin; t < end; t += kLanes<acc>) {
        const int64_t size = std::min(kLanes<acc>, end - t);
        const V keep = live(t, size);
        log_ratios = log_ratios + (read(args_.logprobs, t, size, keep) - read(old_values, t, size, keep));
        if (args_.truncated_is) {
          sum = sum + V::blendv(V(0), at::vec::minimum(V::loadu(weights + (t - begin)), is_cap), keep);
        }
      }
      log_ratio += reduce_sum<acc>(log_ratios);
      importances += reduce_sum<acc>(sum);
    }
    ratio_ = static_cast<acc>(std::exp(log_ratio / count_));
    const auto s = surrogate<acc>(args_, V(ratio_), V(0), advantage_);
    shared_slope_ = static_cast<acc>(first(s.slope) * importances / count_);
    row_[kRatio] = row_[kRatioMax] = ratio_;
    row_[kBelow] = first(s.below);
    row_[kAbove] = first(s.above);
  }

  static double first(const V& v) {
    acc lanes[kLanes<acc>];
    v.store(lanes);
    return lanes[0];
  }

  void fold_block(int64_t begin, int64_t end) {
    const V zero(0), one(1), beta(args_.beta), scale(weight()), is_cap(args_.is_cap);
    const bool shared_slope = args_.sequence && !args_.cispo;
    const void* old_values = args_.old == nullptr ? args_.logprobs : args_.old;
    acc ratios[kBlock], weights[kBlock], odds_of[kBlock];
    if (args_.old != nullptr && !args_.sequence) {
      exp_difference(args_.logprobs, args_.old, begin, end, ratios);
    }
    if (args_.truncated_is) {
      exp_difference(old_values, args_.sampler, begin, end, weights);
    }
    if (args_.ref != nullptr) {
      exp_difference(args_.ref, args_.logprobs, begin, end, odds_of);
    }
    V sums[kColumns];
    std::fill(sums, sums + kColumns, zero);
    for (int64_t t = begin; t < end; t += kLanes<acc>) {
      const int64_t size = std::min(kLanes<acc>, end - t), i = t - begin;
      const V keep = live(t, size);
      const V logprob = read(args_.logprobs, t, size, keep);
      const V old = args_.old == nullptr ? logprob : read(args_.old, t, size, keep);
      // On-policy the ratio is 1, or NaN where the log-prob is.
      const V ratio = args_.sequence ? V(ratio_) : args_.old == nullptr ? one + (logprob - old) : V::loadu(ratios + i);
      const auto s = surrogate<acc>(args_, ratio, logprob, advantage_);
      V loss = s.loss, grad = shared_slope ? V(shared_slope_) : s.slope;
      if (args_.sampler != nullptr) {
        const V sampler = read(args_.sampler, t, size, keep);
        if (args_.truncated_is) {
          const V weight = at::vec::minimum(V::loadu(weights + i), is_cap);
          loss = loss * weight;
          grad = shared_slope ? grad : grad * weight;
        }
        const V gap = (old - sampler).abs();
        sums[kGap] = sums[kGap] + gap;
        sums[kGapMax] = at::vec::maximum(sums[kGapMax], gap);
      }
      if (args_.ref != nullptr) {
        const V distance = read(args_.ref, t, size, keep) - logprob;
        const V odds = V::loadu(odds_of + i);
        const V kl = odds - distance - one;
        sums[kKl] = sums[kKl] + kl;
        if (args_.beta != 0) {
          loss = loss + beta * kl;
          grad = grad + beta * (one - odds);
        }
      }
      if (args_.entropy != nullptr) {
        sums[kEntropy] = sums[kEntropy] + read(args_.entropy, t, size, keep);
      }
      if (!args_.sequence) {
        const V kept = V::blendv(zero, ratio, keep);
        sums[kRatio] = sums[kRatio] + kept;
        sums[kRatioMax] = at::vec::maximum(sums[kRatioMax], kept);
        sums[kBelow] = sums[kBelow] + (s.below & keep);
        sums[kAbove] = sums[kAbove] + (s.above & keep);
      }
      sums[kLoss] = sums[kLoss] + V::blendv(zero, loss, keep);
      V::blendv(zero, grad * scale, keep).store(static_cast<acc*>(args_.grad) + t, static_cast<int>(size));
    }
    for (const Column column : {kLoss, kRatio, kBelow, kAbove, kKl, kGap, kEntropy}) {
      row_[column] += reduce_sum<acc>(sums[column]);
    }
    for (const Column column : {kRatioMax, kGapMax}) {
      row_[column] = largest(row_[column], reduce_max<acc>(sums[column]));
    }
  }

  const GrpoArgs& args_;
  const int64_t begin_, end_;
  double* const row_;
  const acc advantage_;
  double count_;          // tokens of the sample that count, at least 1
  acc ratio_ = 1;         // one per sample
  acc shared_slope_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace

R1FAST_KERNEL(grpo_samples, GrpoArgs) {
  for (int64_t n = begin; n < end; ++n) {
    args.dtype == at::kDouble ? Sample<double>(args, n).fold() : Sample<float>(args, n).fold();
  }
}

}  // namespace r1fast

#ifdef R1FAST_BUILD_OPERATOR

#include "../group_advantages.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string>

namespace r1fast {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// About 20 us: enough to pay for waking a thread.
constexpr int64_t kTokensPerTask = 8192;

// Contiguous [size] of a dtype; undefined when it is not given.
at::Tensor prepare(const char* name, const OptionalTensor& values, int64_t size, at::ScalarType dtype) {
  if (!values) {
    return {};
  }
  TORCH_CHECK_VALUE(
      values->dim() == 1 && values->size(0) == size,
      "grpo_loss: got ", name, " ", values->sizes(), ", expected [", size, "]");
  return values->to(dtype).contiguous();
}

const void* data(const at::Tensor& values) {
  return values.defined() ? values.const_data_ptr() : nullptr;
}

template <typename T>
const T* data(const at::Tensor& values) {
  return static_cast<const T*>(data(values));
}

void check_packing(const at::Tensor& starts, int64_t num_tokens) {
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t num_samples = starts.numel() - 1;
  TORCH_CHECK_VALUE(
      start[num_samples] == num_tokens,
      "grpo_loss: cu_seqlens ends at ", start[num_samples], " but there are ", num_tokens,
      " log-probabilities; pass completion tokens only, and the boundaries of these");
  TORCH_CHECK_VALUE(
      start[0] == 0 && std::is_sorted(start, start + num_samples + 1),
      "grpo_loss: got cu_seqlens that begins at ", start[0], " or decreases, expected 0 and no decrease");
}

// Of samples in double, rounded as group_advantages would return them.
at::Tensor fused_advantages(
    const at::Tensor& rewards_N, const OptionalTensor& group_ids_N, int64_t num_samples, const std::string& scale) {
  const at::Tensor rewards = prepare("rewards_N", rewards_N, num_samples, at::kDouble);
  const at::Tensor group_ids = prepare("group_ids_N", group_ids_N, num_samples, at::kLong);
  TORCH_CHECK_VALUE(group_ids.defined(), "grpo_loss: got rewards_N alone, expected group_ids_N with it");
  const auto advantages =
      group_advantages(data<double>(rewards), data<int64_t>(group_ids), num_samples, scale, /*eps=*/1e-4);
  const bool round = rewards_N.scalar_type() != at::kDouble;
  at::Tensor out = at::empty({num_samples}, rewards.options());
  std::transform(advantages.begin(), advantages.end(), out.mutable_data_ptr<double>(), [&](double x) {
    return round ? static_cast<double>(static_cast<float>(x)) : x;
  });
  return out;
}

// What the loss of a token is divided by, the tokens of its sample left aside.
double divisor(
    const std::string& loss_type, const at::Tensor& mask, const OptionalTensor& num_items,
    const OptionalTensor& num_samples, std::optional<int64_t> max_completion_length, int64_t tokens, int64_t samples) {
  if (loss_type == "grpo" || loss_type == "dr_grpo") {
    const double count = num_samples ? num_samples->item().toDouble() : static_cast<double>(samples);
    return std::max(count, 1.0) * static_cast<double>(loss_type == "grpo" ? 1 : max_completion_length.value());
  }
  if (num_items) {
    return std::max(num_items->item().toDouble(), 1.0);
  }
  const bool* keep = data<bool>(mask);
  return static_cast<double>(std::max<int64_t>(keep == nullptr ? tokens : std::count(keep, keep + tokens, true), 1));
}

// The rows of partial sums, in order, into (loss, metrics).
std::tuple<at::Tensor, at::Tensor> add_up(
    const double* partials, int64_t num_samples, bool sequence, const at::TensorOptions& options) {
  double total[kColumns] = {};
  for (int64_t n = 0; n < num_samples; ++n) {
    for (int64_t column = 0; column < kColumns; ++column) {
      const double x = partials[n * kColumns + column];
      const bool is_max = column == kRatioMax || column == kGapMax;
      total[column] = is_max ? largest(total[column], x) : total[column] + x;
    }
  }
  at::Tensor result = at::empty({kColumns - kFirstMetric}, options.dtype(at::kDouble));
  double* metric = result.mutable_data_ptr<double>();
  const double tokens = std::max(total[kLive], 1.0);
  const double owners = sequence ? static_cast<double>(std::max<int64_t>(num_samples, 1)) : tokens;
  for (int64_t column = kFirstMetric; column < kColumns; ++column) {
    const bool is_mean = column != kRatioMax && column != kGapMax;
    metric[column - kFirstMetric] = total[column] / (!is_mean ? 1 : column <= kOutside ? owners : tokens);
  }
  at::Tensor loss = at::empty({}, options.dtype(at::kDouble));
  *loss.mutable_data_ptr<double>() = total[kLoss];
  return {loss.to(options.dtype()), result.to(options.dtype())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grpo_loss(
    const at::Tensor& logprobs_T, const at::Tensor& cu_seqlens, const OptionalTensor& advantages_N,
    const OptionalTensor& rewards_N, const OptionalTensor& group_ids_N, std::string scale_rewards,
    const OptionalTensor& old_T, const OptionalTensor& ref_T, const OptionalTensor& sampler_T,
    const OptionalTensor& mask_T, const OptionalTensor& entropy_T, const OptionalTensor& counts_N,
    const OptionalTensor& num_items, const OptionalTensor& num_samples, double epsilon_low, double epsilon_high,
    std::optional<double> delta, double beta, std::optional<double> is_cap, std::string loss_type,
    std::string importance_level, std::optional<int64_t> max_completion_length) {
  const int64_t T = logprobs_T.numel();
  const int64_t N = cu_seqlens.numel() - 1;
  const auto dtype = logprobs_T.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(N >= 0, "grpo_loss: got an empty cu_seqlens, expected [N + 1]");
  TORCH_CHECK_VALUE(advantages_N || rewards_N, "grpo_loss: got neither advantages_N nor rewards_N");
  const at::Tensor starts = prepare("cu_seqlens", cu_seqlens, N + 1, at::kLong);
  check_packing(starts, T);
  const at::Tensor advantages = advantages_N ? prepare("advantages_N", advantages_N, N, at::kDouble)
                                             : fused_advantages(*rewards_N, group_ids_N, N, scale_rewards);
  const at::Tensor logprobs = prepare("logprobs_T", logprobs_T, T, dtype);
  const at::Tensor old = prepare("old_T", old_T, T, dtype);
  const at::Tensor ref = prepare("ref_T", ref_T, T, dtype);
  const at::Tensor sampler = prepare("sampler_T", sampler_T, T, dtype);
  const at::Tensor entropy = prepare("entropy_T", entropy_T, T, dtype);
  const at::Tensor mask = prepare("mask_T", mask_T, T, at::kBool);
  const at::Tensor counts = prepare("counts_N", counts_N, N, at::kLong);
  TORCH_CHECK_VALUE(beta == 0 || ref.defined(), "grpo_loss: beta=", beta, " needs ref_T");
  TORCH_CHECK_VALUE(!is_cap || sampler.defined(), "grpo_loss: is_cap needs sampler_T");

  const bool cispo = loss_type == "cispo";
  const bool sequence = importance_level == "sequence";
  at::Tensor grad = at::empty({T}, logprobs.options());
  at::Tensor partials = at::empty({N, kColumns}, logprobs.options().dtype(at::kDouble));
  const GrpoArgs args{
      dtype, data(logprobs), data(old), data(ref), data(sampler), data(entropy), data<bool>(mask),
      data<int64_t>(starts), data<int64_t>(counts), data<double>(advantages), grad.mutable_data_ptr(),
      partials.mutable_data_ptr<double>(), 1 - epsilon_low, cispo ? epsilon_high : 1 + epsilon_high,
      delta.value_or(std::numeric_limits<double>::infinity()), beta, is_cap.value_or(0),
      1 / divisor(loss_type, mask, num_items, num_samples, max_completion_length, T, N), is_cap.has_value(), cispo,
      sequence, loss_type == "grpo"};
  // A thread takes the samples that begin in its share of the tokens, so that ragged lengths balance.
  const int64_t* start = args.starts;
  const auto first_sample = [&](int64_t token) {
    return token == 0 ? 0 : token >= T ? N : std::lower_bound(start, start + N, token) - start;
  };
  at::parallel_for(0, std::max<int64_t>(T, 1), kTokensPerTask, [&](int64_t begin, int64_t end) {
    R1FAST_PICK(grpo_samples)(args, first_sample(begin), first_sample(end));
  });
  auto [loss, metrics] = add_up(partials.const_data_ptr<double>(), N, sequence, logprobs.options());
  return {loss, grad, metrics};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("grpo_loss", &grpo_loss);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
