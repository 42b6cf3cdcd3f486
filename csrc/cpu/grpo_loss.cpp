// GRPO's loss, its gradient and its metrics in one pass over the tokens (two where something is of whole samples).
//
// A sample is folded by one thread in a fixed order and leaves a row of partial sums; the rows are added in order by
// one thread: the same bits for any number of threads.
#include "../operator.h"
#include "loss_options.h"  // made by setup.py from kernels/r1fast_kernels/loss_options.py

#include <cmath>

namespace r1fast {

// Columns of the partial sums, and of the result: the loss, then kLive, then the metrics.
enum Column : int64_t {
  kLoss, kLive, kRatio, kRatioMax, kBelow, kAbove, kOutside, kKl, kGap, kGapMax, kEntropy, kWeight, kDropped,
  kColumns
};
constexpr int64_t kFirstMetric = kRatio;

// Of two, NaN when one is.
inline double largest(double a, double b) {
  return a >= b || std::isnan(a) ? a : b;
}

enum class Kl { k1, k2, k3, k3_unbiased };

// In the order of the table; NaN where an option is off.
struct LossOptions {
#define R1FAST_FIELD(name) double name;
  R1FAST_LOSS_NUMBERS(R1FAST_FIELD)
#undef R1FAST_FIELD
};

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
  void* grad_entropy;        // [T], or null: without entropy_coef
  double* partials;          // [N, kColumns]
  LossOptions options;
  double clip_low;
  double clip_high;  // cispo: the cap
  double scale;      // of every token's loss
  double entropy_threshold;  // NaN: none
  Kl kl;
  bool token_weights, sample_weights;
  bool masks;  // weights out of bounds are 0, else they are clamped
  bool cispo, sequence;
  bool sample_mean;  // divide by the tokens of the sample too

  bool off_policy() const { return !std::isnan(options.off_policy_mask_threshold); }
};

namespace {

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
  const V zero(0), one(1), advantage(advantage_n), low(args.clip_low), high(args.clip_high);
  const V delta(std::isnan(args.options.delta) ? kInf<acc> : static_cast<acc>(args.options.delta));
  const V positive(advantage_n > 0 ? 1 : 0), negative(advantage_n < 0 ? 1 : 0);
  if (args.cispo) {
    const V slope = (minimum(ratio, high) * advantage).neg();
    return {slope * logprob, slope, zero, (ratio > high) & positive};
  }
  const V capped = minimum(ratio, delta);
  const V a = capped * advantage;
  const V b = minimum(maximum(ratio, low), high) * advantage;
  // As autograd has it: on an edge clamp passes the gradient, and a tie of the minimum gives half to each side.
  const V a_stops = (a > b) | (ratio > delta);
  const V b_stops = (b > a) | (ratio < low) | (ratio > high);
  const V share = V::blendv(one, V(0.5), a == b);
  const V passes = V::blendv(share, zero, a_stops) + V::blendv(share, zero, b_stops);
  // A ratio of infinity that is clipped has slope 0: select, 0 times infinity is NaN.
  const V slope = V::blendv((passes * ratio * advantage).neg(), zero, passes == zero);
  return {minimum(a, b).neg(), slope, (capped < low) & negative, (capped > high) & positive};
}

template <typename acc>
class Sample {
  using V = Vec<acc>;

 public:
  Sample(const GrpoArgs& args, int64_t n)
      : args_(args), begin_(args.starts[n]), end_(args.starts[n + 1]), row_(args.partials + n * kColumns),
        advantage_(static_cast<acc>(args.advantages[n]) *
                   static_cast<acc>(args.advantages[n] > 0 ? args.options.positive_advantage_weight : 1)) {
    std::fill(row_, row_ + kColumns, 0.0);
    const int64_t live = args.mask == nullptr ? end_ - begin_ : std::count(args.mask + begin_, args.mask + end_, true);
    row_[kLive] = static_cast<double>(live);
    count_ = static_cast<double>(std::max<int64_t>(args.counts == nullptr ? live : args.counts[n], 1));
  }

  void fold() {
    if (args_.sequence || args_.sample_weights || args_.off_policy()) {
      fold_sample();
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

  // Of exp(old - sampler log-prob), in place of it. A bound that is off is infinite.
  struct Bounds {
    V low, high, below, above;

    explicit Bounds(const GrpoArgs& args)
        : low(std::isnan(args.options.is_min) ? -kInf<acc> : static_cast<acc>(args.options.is_min)),
          high(std::isnan(args.options.is_cap) ? kInf<acc> : static_cast<acc>(args.options.is_cap)),
          below(args.masks ? V(0) : low), above(args.masks ? V(0) : high) {}

    V operator()(const V& weight) const {
      return V::blendv(V::blendv(weight, below, weight < low), above, weight > high);
    }
  };

  V has_surrogate(int64_t t, int64_t size, const V& keep) const {
    return read(args_.entropy, t, size, keep) >= V(static_cast<acc>(args_.entropy_threshold));
  }

  // What the terms of a token need to know of its whole sample.
  void fold_sample() {
    const void* old_values = args_.old == nullptr ? args_.logprobs : args_.old;
    const void* sampler_values = args_.sampler == nullptr ? old_values : args_.sampler;
    const bool weighs_kl = args_.kl == Kl::k3_unbiased && args_.ref != nullptr;
    const bool all_kept = !args_.token_weights && std::isnan(args_.entropy_threshold);
    const Bounds bounded(args_);
    double log_ratio = 0, log_weight = 0, distance = 0, kl = 0, factors = all_kept ? row_[kLive] : 0;
    for (int64_t begin = begin_; begin < end_; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, end_);
      acc weights[kBlock], odds_of[kBlock];
      if (args_.token_weights) {
        exp_difference(old_values, sampler_values, begin, end, weights);
      }
      if (weighs_kl) {
        exp_difference(args_.ref, args_.logprobs, begin, end, odds_of);
      }
      V log_ratios(0), log_weights(0), distances(0), kls(0), sum(0);
      for (int64_t t = begin; t < end; t += kLanes<acc>) {
        const int64_t size = std::min(kLanes<acc>, end - t), i = t - begin;
        const V keep = live(t, size);
        const V logprob = read(args_.logprobs, t, size, keep), old = read(old_values, t, size, keep);
        log_ratios = log_ratios + (logprob - old);
        if (args_.sample_weights || args_.off_policy()) {
          const V sampler = read(sampler_values, t, size, keep);
          log_weights = log_weights + (old - sampler);
          distances = distances + (sampler - logprob);
        }
        if (weighs_kl) {
          kls = kls + (V::loadu(odds_of + i) - (read(args_.ref, t, size, keep) - logprob) - V(1));
        }
        if (!all_kept) {
          V factor = V::blendv(V(0), args_.token_weights ? bounded(V::loadu(weights + i)) : V(1), keep);
          if (!std::isnan(args_.entropy_threshold)) {
            factor = V::blendv(V(0), factor, has_surrogate(t, size, keep));
          }
          sum = sum + factor;
        }
      }
      log_ratio += reduce_sum<acc>(log_ratios);
      log_weight += reduce_sum<acc>(log_weights);
      distance += reduce_sum<acc>(distances);
      kl += reduce_sum<acc>(kls);
      factors += all_kept ? 0 : reduce_sum<acc>(sum);
    }
    if (args_.sample_weights) {
      factor_ = static_cast<acc>(row_[kWeight] = first(bounded(V(static_cast<acc>(std::exp(log_weight))))));
    }
    if (args_.off_policy() && advantage_ < 0 && distance / count_ > args_.options.off_policy_mask_threshold) {
      row_[kDropped] = 1;
      factor_ = 0;
    }
    if (args_.sequence) {
      ratio_ = static_cast<acc>(std::exp(log_ratio / count_));
      const auto s = surrogate<acc>(args_, V(ratio_), V(0), advantage_);
      const double shared = factors * factor_;
      shared_slope_ = shared == 0 ? acc(0) : static_cast<acc>(first(s.slope) * shared / count_);
      shared_kl_slope_ = weighs_kl ? static_cast<acc>(ratio_ * kl / count_) : acc(0);
      row_[kRatio] = row_[kRatioMax] = ratio_;
      row_[kBelow] = first(s.below);
      row_[kAbove] = first(s.above);
    }
  }

  static double first(const V& v) {
    acc lanes[kLanes<acc>];
    v.store(lanes);
    return lanes[0];
  }

  struct Divergence {
    V value, slope;  // slope: d value / d logprob, but for what a ratio of the whole sample adds
  };

  Divergence divergence(const V& distance, const V& odds, const V& ratio) const {
    const V one(1);
    switch (args_.kl) {
      case Kl::k1:
        return {distance.neg(), V::blendv(one, distance, distance != distance)};
      case Kl::k2:
        return {V(0.5) * distance * distance, distance.neg()};
      default:
        break;
    }
    const V k3 = odds - distance - one, slope = one - odds;
    if (args_.kl == Kl::k3) {
      return {k3, slope};
    }
    return {ratio * k3, args_.sequence ? ratio * slope + V(shared_kl_slope_) : ratio * (slope + k3)};
  }

  void fold_block(int64_t begin, int64_t end) {
    const auto& o = args_.options;
    const V zero(0), one(1), beta(static_cast<acc>(o.beta)), scale(weight()), of_sample(factor_);
    const bool shared_slope = args_.sequence && !args_.cispo, selects = !std::isnan(args_.entropy_threshold);
    const bool is_plain = !selects && !args_.token_weights && factor_ == 1;
    const Bounds bounded(args_);
    const auto of_ratio = surrogate<acc>(args_, V(ratio_), zero, advantage_);  // where it is the sample's
    const void* old_values = args_.old == nullptr ? args_.logprobs : args_.old;
    acc ratios[kBlock], weights[kBlock], odds_of[kBlock];
    if (args_.old != nullptr && !args_.sequence) {
      exp_difference(args_.logprobs, args_.old, begin, end, ratios);
    }
    if (args_.token_weights) {
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
      const auto s = shared_slope ? of_ratio : surrogate<acc>(args_, ratio, logprob, advantage_);
      V loss = s.loss, grad = s.slope, factor = of_sample;
      if (args_.sampler != nullptr) {
        if (args_.token_weights) {
          const V weight = bounded(V::loadu(weights + i));
          factor = factor * weight;
          sums[kWeight] = sums[kWeight] + V::blendv(zero, weight, keep);
        }
        const V gap = (old - read(args_.sampler, t, size, keep)).abs();
        sums[kGap] = sums[kGap] + gap;
        sums[kGapMax] = maximum(sums[kGapMax], gap);
      }
      if (selects) {
        factor = V::blendv(zero, factor, has_surrogate(t, size, keep));
      }
      if (!is_plain) {
        loss = V::blendv(loss * factor, zero, factor == zero);
        grad = V::blendv(grad * factor, zero, factor == zero);
      }
      if (shared_slope) {
        grad = V(shared_slope_);
      }
      if (args_.ref != nullptr) {
        const auto kl = divergence(read(args_.ref, t, size, keep) - logprob, V::loadu(odds_of + i), ratio);
        sums[kKl] = sums[kKl] + V::blendv(zero, kl.value, keep);
        if (o.beta != 0) {
          loss = loss + beta * kl.value;
          grad = grad + beta * kl.slope;
        }
      }
      if (args_.entropy != nullptr) {
        const V entropy = read(args_.entropy, t, size, keep);
        sums[kEntropy] = sums[kEntropy] + entropy;
        if (args_.grad_entropy != nullptr) {
          V bonus = V::blendv(zero, V(static_cast<acc>(o.entropy_coef)), keep);
          bonus = selects ? V::blendv(zero, bonus, has_surrogate(t, size, keep)) : bonus;
          loss = loss - bonus * entropy;
          (bonus * scale).neg().store(static_cast<acc*>(args_.grad_entropy) + t, static_cast<int>(size));
        }
      }
      if (!args_.sequence) {
        const V kept = V::blendv(zero, ratio, keep);
        sums[kRatio] = sums[kRatio] + kept;
        sums[kRatioMax] = maximum(sums[kRatioMax], kept);
        sums[kBelow] = sums[kBelow] + (s.below & keep);
        sums[kAbove] = sums[kAbove] + (s.above & keep);
      }
      sums[kLoss] = sums[kLoss] + V::blendv(zero, loss, keep);
      V::blendv(zero, grad * scale, keep).store(static_cast<acc*>(args_.grad) + t, static_cast<int>(size));
    }
    for (const Column column : {kLoss, kRatio, kBelow, kAbove, kKl, kGap, kEntropy, kWeight}) {
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
  acc factor_ = 1;        // of every token's surrogate
  acc shared_slope_ = 0;  // what each token's log-prob does to the loss through the ratio of the sample
  acc shared_kl_slope_ = 0;
};

}  // namespace

R1FAST_KERNEL(grpo_samples, GrpoArgs) {
  for (int64_t n = begin; n < end; ++n) {
    args.dtype == at::kDouble ? Sample<double>(args, n).fold() : Sample<float>(args, n).fold();
  }
}

#ifdef R1FAST_BUILD_OPERATOR
at::Tensor group_advantages(const at::Tensor& rewards_N, const at::Tensor& group_ids_N, std::string scale, double eps);

namespace {

// About 20 us: enough to pay for waking a thread.
constexpr int64_t kTokensPerTask = 8192;

// Contiguous [size] of a dtype; undefined when it is not given.
at::Tensor prepare(const char* name, const OptionalTensor& values, int64_t size, at::ScalarType dtype) {
  if (!values) {
    return {};
  }
  TORCH_CHECK_VALUE(
      values->dim() == 1 && values->size(0) == size, "grpo_loss: got ", name, " ", values->sizes(), ", expected [", size,
      "]");
  return values->to(dtype).contiguous();
}

template <typename T = void>
const T* data(const at::Tensor& values) {
  return values.defined() ? static_cast<const T*>(values.const_data_ptr()) : nullptr;
}

void check_packing(const at::Tensor& starts, int64_t num_tokens) {
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t num_samples = starts.numel() - 1;
  TORCH_CHECK_VALUE(
      start[num_samples] == num_tokens, "grpo_loss: cu_seqlens ends at ", start[num_samples], " but there are ",
      num_tokens, " log-probabilities; pass completion tokens only, and the boundaries of these");
  TORCH_CHECK_VALUE(
      start[0] == 0 && std::is_sorted(start, start + num_samples + 1),
      "grpo_loss: got cu_seqlens that begins at ", start[0], " or decreases, expected 0 and no decrease");
}

// What the loss of a token is divided by, the tokens of its sample left aside.
double divisor(
    const std::string& loss_type, const at::Tensor& mask, const OptionalTensor& num_items,
    const OptionalTensor& num_samples, double max_completion_length, int64_t tokens, int64_t samples) {
  if (loss_type == "grpo" || loss_type == "dr_grpo") {
    const double count = num_samples ? num_samples->item().toDouble() : static_cast<double>(samples);
    return std::max(count, 1.0) * (loss_type == "grpo" ? 1.0 : max_completion_length);
  }
  if (num_items) {
    return std::max(num_items->item().toDouble(), 1.0);
  }
  const bool* keep = data<bool>(mask);
  return static_cast<double>(std::max<int64_t>(keep == nullptr ? tokens : std::count(keep, keep + tokens, true), 1));
}

// The rows of partial sums, in order, into (loss, metrics).
std::tuple<at::Tensor, at::Tensor> add_up(
    const double* partials, int64_t num_samples, bool sequence, bool sample_weights, const at::TensorOptions& options) {
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
  const double samples = static_cast<double>(std::max<int64_t>(num_samples, 1));
  for (int64_t column = kFirstMetric; column < kColumns; ++column) {
    const bool is_max = column == kRatioMax || column == kGapMax;
    const bool of_samples = (sequence && column <= kOutside) || (sample_weights && column == kWeight) || column == kDropped;
    metric[column - kFirstMetric] = total[column] / (is_max ? 1 : of_samples ? samples : tokens);
  }
  at::Tensor loss = at::empty({}, options.dtype(at::kDouble));
  *loss.mutable_data_ptr<double>() = total[kLoss];
  return {loss.to(options.dtype()), result.to(options.dtype())};
}

LossOptions read_options(at::ArrayRef<double> numbers) {
  LossOptions options;
  TORCH_CHECK_VALUE(
      numbers.size() * sizeof(double) == sizeof options,
      "grpo_loss: got ", numbers.size(), " numbers, expected ", sizeof options / sizeof(double));
  std::copy(numbers.begin(), numbers.end(), reinterpret_cast<double*>(&options));
  return options;
}

Kl kl_named(std::string_view name) {
  return name == "k1" ? Kl::k1 : name == "k2" ? Kl::k2 : name == "k3" ? Kl::k3 : Kl::k3_unbiased;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grpo_loss(
    const at::Tensor& logprobs_T, const at::Tensor& cu_seqlens, const OptionalTensor& advantages_N,
    const OptionalTensor& rewards_N, const OptionalTensor& group_ids_N, const OptionalTensor& old_T,
    const OptionalTensor& ref_T, const OptionalTensor& sampler_T, const OptionalTensor& mask_T,
    const OptionalTensor& entropy_T, const OptionalTensor& entropy_threshold, const OptionalTensor& counts_N,
    const OptionalTensor& num_items, const OptionalTensor& num_samples, at::ArrayRef<double> numbers,
    std::vector<std::string> words) {
  const LossOptions o = read_options(numbers);
  const auto word = [&](LossWord name) -> const std::string& { return words.at(static_cast<size_t>(name)); };
  const std::string& loss_type = word(LossWord::loss_type);
  const int64_t T = logprobs_T.numel();
  const int64_t N = cu_seqlens.numel() - 1;
  const auto dtype = computed_in(logprobs_T.scalar_type());
  TORCH_CHECK_VALUE(N >= 0, "grpo_loss: got an empty cu_seqlens, expected [N + 1]");
  TORCH_CHECK_VALUE(
      advantages_N || (rewards_N && group_ids_N), "grpo_loss: got neither advantages_N nor rewards_N with group_ids_N");
  const at::Tensor starts = prepare("cu_seqlens", cu_seqlens, N + 1, at::kLong);
  check_packing(starts, T);
  const OptionalTensor fused_N =
      advantages_N ? advantages_N : group_advantages(*rewards_N, *group_ids_N, word(LossWord::scale_rewards), 1e-4);
  const at::Tensor advantages = prepare("advantages_N", fused_N, N, at::kDouble);
  const at::Tensor logprobs = prepare("logprobs_T", logprobs_T, T, dtype);
  const at::Tensor old = prepare("old_T", old_T, T, dtype);
  const at::Tensor ref = prepare("ref_T", ref_T, T, dtype);
  const at::Tensor sampler = prepare("sampler_T", sampler_T, T, dtype);
  const at::Tensor entropy = prepare("entropy_T", entropy_T, T, dtype);
  const at::Tensor mask = prepare("mask_T", mask_T, T, at::kBool);
  const at::Tensor counts = prepare("counts_N", counts_N, N, at::kLong);
  const bool has_weights = !std::isnan(o.is_cap) || !std::isnan(o.is_min);
  TORCH_CHECK_VALUE(o.beta == 0 || ref.defined(), "grpo_loss: beta=", o.beta, " needs ref_T");
  TORCH_CHECK_VALUE(!has_weights || sampler.defined(), "grpo_loss: is_cap and is_min need sampler_T");
  TORCH_CHECK_VALUE(
      (o.entropy_coef == 0 && !entropy_threshold) || entropy.defined(),
      "grpo_loss: entropy_coef and top_entropy_quantile need entropy_T");

  const bool cispo = loss_type == "cispo";
  const bool sequence = word(LossWord::importance_level) == "sequence";
  const bool of_samples = has_weights && word(LossWord::is_mode).starts_with("sequence");
  at::Tensor grad = at::empty({T}, logprobs.options());
  at::Tensor grad_entropy = at::empty({o.entropy_coef == 0 ? 0 : T}, logprobs.options());
  at::Tensor partials = at::empty({N, kColumns}, logprobs.options().dtype(at::kDouble));
  const GrpoArgs args{
      .dtype = dtype, .logprobs = data(logprobs), .old = data(old), .ref = data(ref), .sampler = data(sampler),
      .entropy = data(entropy), .mask = data<bool>(mask), .starts = data<int64_t>(starts),
      .counts = data<int64_t>(counts), .advantages = data<double>(advantages), .grad = grad.mutable_data_ptr(),
      .grad_entropy = o.entropy_coef == 0 ? nullptr : grad_entropy.mutable_data_ptr(),
      .partials = partials.mutable_data_ptr<double>(), .options = o, .clip_low = 1 - o.epsilon,
      .clip_high = cispo ? o.epsilon_high : 1 + o.epsilon_high,
      .scale = 1 / divisor(loss_type, mask, num_items, num_samples, o.max_completion_length, T, N),
      .entropy_threshold = entropy_threshold ? entropy_threshold->item().toDouble() : std::nan(""),
      .kl = kl_named(word(LossWord::kl_estimator)), .token_weights = has_weights && !of_samples,
      .sample_weights = of_samples, .masks = word(LossWord::is_mode).ends_with("mask"), .cispo = cispo,
      .sequence = sequence, .sample_mean = loss_type == "grpo"};
  // A thread takes the samples that begin in its share of the tokens, so that ragged lengths balance.
  const int64_t* start = args.starts;
  const auto first_sample = [&](int64_t token) {
    return token == 0 ? 0 : token >= T ? N : std::lower_bound(start, start + N, token) - start;
  };
  at::parallel_for(0, std::max<int64_t>(T, 1), kTokensPerTask, [&](int64_t begin, int64_t end) {
    R1FAST_PICK(grpo_samples)(args, first_sample(begin), first_sample(end));
  });
  auto [loss, metrics] = add_up(args.partials, N, sequence, of_samples, logprobs.options());
  return {loss, grad, grad_entropy, metrics};
}

}  // namespace

// What this was built with; Python compares it with its table.
TORCH_LIBRARY_FRAGMENT(r1fast, m) {
  m.def("grpo_loss_table() -> str", [] { return std::string(R1FAST_LOSS_TABLE); });
}

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("grpo_loss", &grpo_loss);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
