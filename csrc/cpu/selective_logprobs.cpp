// Log-probability of one token per row and entropy of the row, from logits: forward in one pass over memory, backward
// in one read and one write. The same passes serve the tiles of linear_logprobs, which hold some columns of each row.
//
// Rows are independent and each is folded in a fixed order: the same bits for any number of threads.
#include "../operator.h"

#include <cmath>

namespace r1fast {

struct FoldArgs {
  at::ScalarType dtype;
  const void* logits;         // [T, V], row stride `row_stride`, column stride 1
  const int64_t* target_ids;  // [T]
  double* state;              // [T, 4], read and written; null: each row begins and ends here
  void* logprobs;             // [T], when state is null
  void* entropy;              // [T], or null: not wanted
  void* stats;                // [T, 2]: max of the logits and log sum exp((logits - max) / temperature)
  int64_t row_stride, vocab;
  int64_t first_id;  // the token of column 0
  double temperature;
  bool with_entropy;
};

struct GradientArgs {
  at::ScalarType dtype;
  const void* logits;  // [T, V]
  void* grad;          // [T, V], may be the logits themselves
  const int64_t* target_ids;
  const void* stats;          // [T, 2]
  const void* entropy;        // [T], read where grad_entropy is
  const void* grad_logprobs;  // [T]
  const void* grad_entropy;   // [T], or null
  int64_t row_stride, grad_row_stride, vocab, first_id;
  double temperature;
};

namespace {

// The second sweep over a block must find it in the L1 cache (32-48 KB): 2048 floats are 8 KB.
constexpr int64_t kBlock = 2048;
// A masked logit is infinitely far below the maximum; from here on, so that 0 times its distance is 0.
template <typename acc>
constexpr acc kFarthest = std::numeric_limits<acc>::lowest();
// e^x is 0 below, in double too: ln p may be clamped here, so that 0 ln 0 is 0 and no factor overflows.
template <typename acc>
constexpr acc kNoWeight = -1000;

// Running (max, sum e^d, sum d e^d, logit of the target) of one row, with d = (logit - max) / temperature. Sums of blocks
// are added in double: a vocabulary of 150k would otherwise lose three digits.
struct RowState {
  double max = -kInf<double>;
  double sum = 0;
  double weighted = 0;
  double target = std::numeric_limits<double>::quiet_NaN();  // until its column has been seen
};

// `size` is a multiple of a pair of vectors.
template <bool kEntropy, typename T>
inline void fold_block(const T* x, int64_t size, double temperature, RowState& row) {
  using acc = acc_t<T>;
  Vec<acc> max_a(-kInf<acc>), max_b(-kInf<acc>);
  for (int64_t i = 0; i < size; i += kPair<acc>) {
    const auto [a, b] = load_pair(x + i);
    max_a = at_least(max_a, a);  // may lose a NaN, which comes back in the sum below
    max_b = at_least(max_b, b);
  }
  const acc top = reduce_max<acc>(maximum(max_a, max_b));
  if (top == -kInf<acc>) {
    // A masked block adds nothing, and -inf minus -inf would be NaN.
    if (std::any_of(x, x + size, [](T value) { return std::isnan(static_cast<acc>(value)); })) {
      row.sum = std::numeric_limits<double>::quiet_NaN();
    }
    return;
  }
  if (!(top <= row.max)) {  // also when top is NaN
    if (row.sum > 0) {
      const double shift = (row.max - top) / temperature;
      const double factor = std::exp(shift);
      row.weighted = factor * (row.weighted + shift * row.sum);
      row.sum *= factor;
    }
    row.max = top;
  }
  const Vec<acc> max(static_cast<acc>(row.max));
  const Vec<acc> lowest(kFarthest<acc>);
  const Exponential<acc> weight_of(1 / temperature);
  Vec<acc> sum_a(0), sum_b(0), weighted_a(0), weighted_b(0);
  const auto add = [&](const Vec<acc>& logits, Vec<acc>& sum, Vec<acc>& weighted) {
    const Vec<acc> distance = logits - max;
    const Vec<acc> weight = weight_of(distance);
    sum = sum + weight;
    if constexpr (kEntropy) {
      weighted = fmadd(weight, at_least(lowest, distance), weighted);
    }
  };
  for (int64_t i = 0; i < size; i += kPair<acc>) {
    const auto [a, b] = load_pair(x + i);
    add(a, sum_a, weighted_a);
    add(b, sum_b, weighted_b);
  }
  row.sum += reduce_sum<acc>(sum_a + sum_b);
  if constexpr (kEntropy) {
    row.weighted += reduce_sum<acc>(weighted_a + weighted_b) / temperature;
  }
}

template <bool kEntropy, typename T>
void fold_rows(const FoldArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const int64_t whole = args.vocab - args.vocab % kPair<acc>;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(args.logits) + t * args.row_stride;
    RowState row;
    if (args.state != nullptr) {
      const double* s = args.state + 4 * t;
      row = {s[0], s[1], s[2], s[3]};
    }
    for (int64_t i = 0; i < whole; i += kBlock) {
      fold_block<kEntropy>(x + i, std::min(kBlock, whole - i), args.temperature, row);
    }
    if (whole < args.vocab) {
      T tail[kPair<acc>];
      std::fill(tail, tail + kPair<acc>, static_cast<T>(-kInf<acc>));
      std::copy(x + whole, x + args.vocab, tail);
      fold_block<kEntropy>(tail, kPair<acc>, args.temperature, row);
    }
    const int64_t column = args.target_ids[t] - args.first_id;
    if (column >= 0 && column < args.vocab) {
      row.target = static_cast<acc>(x[column]);
    }
    if (args.state != nullptr) {
      std::copy_n(&row.max, 4, args.state + 4 * t);
      continue;
    }
    const double log_sum = std::log(row.sum);
    static_cast<acc*>(args.logprobs)[t] = static_cast<acc>((row.target - row.max) / args.temperature - log_sum);
    static_cast<acc*>(args.stats)[2 * t] = static_cast<acc>(row.max);
    static_cast<acc*>(args.stats)[2 * t + 1] = static_cast<acc>(log_sum);
    if constexpr (kEntropy) {
      static_cast<acc*>(args.entropy)[t] = static_cast<acc>(log_sum - row.weighted / row.sum);
    }
  }
}

// grad = p (scale + surprise_scale (ln p + entropy)), then the target's own share; `size` a multiple of a pair.
template <bool kEntropy, typename T>
inline void gradient_block(
    const T* x, T* grad, int64_t size, acc_t<T> inverse_temperature, const acc_t<T>* stats, acc_t<T> entropy,
    acc_t<T> scale, acc_t<T> surprise_scale) {
  using acc = acc_t<T>;
  const Vec<acc> inverse(inverse_temperature), max(stats[0]), log_sum(stats[1]), entropy_v(entropy);
  const Vec<acc> scale_v(scale), surprise_scale_v(surprise_scale), lowest(kNoWeight<acc>);
  const Exponential<acc> p_of(inverse_temperature, -stats[1]);
  const auto gradient = [&](const Vec<acc>& logits) {
    const Vec<acc> distance = logits - max;
    const Vec<acc> p = p_of(distance);
    if constexpr (kEntropy) {
      const Vec<acc> logp = distance * inverse - log_sum;
      return p * (scale_v + surprise_scale_v * (at_least(lowest, logp) + entropy_v));
    } else {
      return p * scale_v;
    }
  };
  for (int64_t i = 0; i < size; i += kPair<acc>) {
    const auto [a, b] = load_pair(x + i);
    store_pair(grad + i, gradient(a), gradient(b));
  }
}

template <bool kEntropy, typename T>
void gradient_rows(const GradientArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const acc inverse = static_cast<acc>(1 / args.temperature);
  const int64_t whole = args.vocab - args.vocab % kPair<acc>;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(args.logits) + t * args.row_stride;
    T* grad = static_cast<T*>(args.grad) + t * args.grad_row_stride;
    const acc* stats = static_cast<const acc*>(args.stats) + 2 * t;
    const acc grad_logprob = static_cast<const acc*>(args.grad_logprobs)[t];
    const acc grad_entropy = kEntropy ? static_cast<const acc*>(args.grad_entropy)[t] : acc(0);
    if (grad_logprob == 0 && grad_entropy == 0) {
      std::fill(grad, grad + args.vocab, T(0));  // a row that no loss reads may hold anything
      continue;
    }
    const acc entropy = kEntropy ? static_cast<const acc*>(args.entropy)[t] : acc(0);
    const acc scale = -grad_logprob * inverse;
    const acc surprise_scale = -grad_entropy * inverse;
    const auto block = [&](const T* in, T* out, int64_t size) {
      gradient_block<kEntropy>(in, out, size, inverse, stats, entropy, scale, surprise_scale);
    };
    // Once more in the end and on its own, so that it is rounded once; read before the row is written over.
    const int64_t column = args.target_ids[t] - args.first_id;
    const bool here = column >= 0 && column < args.vocab;
    const acc target = here ? static_cast<acc>(x[column]) : acc(0);
    block(x, grad, whole);
    if (whole < args.vocab) {
      T tail[kPair<acc>] = {};
      std::copy(x + whole, x + args.vocab, tail);
      block(tail, tail, kPair<acc>);
      std::copy(tail, tail + (args.vocab - whole), grad + whole);
    }
    if (here) {
      const acc logp = (target - stats[0]) * inverse - stats[1];
      acc factor = scale;
      if constexpr (kEntropy) {
        factor += surprise_scale * (std::max(logp, kNoWeight<acc>) + entropy);
      }
      grad[column] = static_cast<T>(std::exp(logp) * factor + grad_logprob * inverse);
    }
  }
}

}  // namespace

R1FAST_KERNEL(fold_logits, FoldArgs) {
  by_dtype(args.dtype, [&]<typename T>() {
    args.with_entropy ? fold_rows<true, T>(args, begin, end) : fold_rows<false, T>(args, begin, end);
  });
}

R1FAST_KERNEL(logits_gradient, GradientArgs) {
  by_dtype(args.dtype, [&]<typename T>() {
    args.grad_entropy != nullptr ? gradient_rows<true, T>(args, begin, end) : gradient_rows<false, T>(args, begin, end);
  });
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

void check(const at::Tensor& logits_TV, const at::Tensor& target_ids_T) {
  check_floats("selective_logprobs", {logits_TV});
  check_tensor("selective_logprobs", "logits_TV", logits_TV, logits_TV.scalar_type(), {-1, -1});
  check_tensor("selective_logprobs", "target_ids_T", target_ids_T, at::kLong, {logits_TV.size(0)});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> selective_logprobs(
    const at::Tensor& logits_TV, const at::Tensor& target_ids_T, double temperature, bool with_entropy,
    bool /*inplace_backward: of autograd*/) {
  check(logits_TV, target_ids_T);
  const int64_t num_tokens = logits_TV.size(0), vocab = logits_TV.size(1);
  const at::Tensor logits = with_unit_columns(logits_TV), ids = target_ids_T.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    TORCH_CHECK_INDEX(
        id[t] >= 0 && id[t] < vocab, "selective_logprobs: target_ids_T[", t, "] is ", id[t], ", expected 0 <= id < ",
        vocab, "; drop ignored positions before the call");
  }
  const auto options = logits.options().dtype(computed_in(logits.scalar_type()));
  at::Tensor logprobs = at::empty({num_tokens}, options);
  at::Tensor entropy = at::empty({with_entropy ? num_tokens : 0}, options);
  at::Tensor stats = at::empty({num_tokens, 2}, options);
  const FoldArgs args{
      logits.scalar_type(), logits.const_data_ptr(), id, nullptr, logprobs.mutable_data_ptr(),
      with_entropy ? entropy.mutable_data_ptr() : nullptr, stats.mutable_data_ptr(), logits.stride(0), vocab, 0,
      temperature, with_entropy};
  run_rows(R1FAST_PICK(fold_logits), args, num_tokens, vocab);
  return {logprobs, entropy, stats};
}

void fold_logits_(
    at::Tensor& state_T4, const at::Tensor& logits_TV, const at::Tensor& target_ids_T, double temperature,
    int64_t first_id, bool with_entropy) {
  check(logits_TV, target_ids_T);
  TORCH_CHECK(state_T4.scalar_type() == at::kDouble && state_T4.is_contiguous(), "state_T4 must be contiguous float64");
  const at::Tensor logits = with_unit_columns(logits_TV), ids = target_ids_T.contiguous();
  const FoldArgs args{
      logits.scalar_type(), logits.const_data_ptr(), ids.const_data_ptr<int64_t>(), state_T4.mutable_data_ptr<double>(),
      nullptr, nullptr, nullptr, logits.stride(0), logits.size(1), first_id, temperature, with_entropy};
  run_rows(R1FAST_PICK(fold_logits), args, logits.size(0), logits.size(1));
}

void write_gradient(
    const at::Tensor& grad_TV, const at::Tensor& logits, const at::Tensor& target_ids_T, const at::Tensor& entropy_T,
    const at::Tensor& stats_T2, const at::Tensor& grad_logprobs_T, const OptionalTensor& grad_entropy_T,
    double temperature, int64_t first_id) {
  check(logits, target_ids_T);
  const at::Tensor ids = target_ids_T.contiguous(), stats = stats_T2.contiguous(), entropy = entropy_T.contiguous();
  const at::Tensor grad_logprobs = grad_logprobs_T.contiguous();  // `.sum().backward()` sends an expanded scalar
  const at::Tensor grad_entropy = grad_entropy_T ? grad_entropy_T->contiguous() : at::Tensor();
  const GradientArgs args{
      logits.scalar_type(), logits.const_data_ptr(), grad_TV.mutable_data_ptr(), ids.const_data_ptr<int64_t>(),
      stats.const_data_ptr(), entropy.const_data_ptr(), grad_logprobs.const_data_ptr(),
      grad_entropy_T ? grad_entropy.const_data_ptr() : nullptr, logits.stride(0), grad_TV.stride(0), logits.size(1),
      first_id, temperature};
  run_rows(R1FAST_PICK(logits_gradient), args, logits.size(0), logits.size(1));
}

at::Tensor selective_logprobs_backward(
    const at::Tensor& logits_TV, const at::Tensor& target_ids_T, const at::Tensor& entropy_T,
    const at::Tensor& stats_T2, const at::Tensor& grad_logprobs_T, const OptionalTensor& grad_entropy_T,
    double temperature) {
  at::Tensor grad_TV = at::empty(logits_TV.sizes(), logits_TV.options());
  write_gradient(
      grad_TV, with_unit_columns(logits_TV), target_ids_T, entropy_T, stats_T2, grad_logprobs_T, grad_entropy_T,
      temperature, 0);
  return grad_TV;
}

void selective_logprobs_backward_(
    at::Tensor& logits_TV, const at::Tensor& target_ids_T, const at::Tensor& entropy_T, const at::Tensor& stats_T2,
    const at::Tensor& grad_logprobs_T, const OptionalTensor& grad_entropy_T, double temperature,
    int64_t first_id) {
  TORCH_CHECK_VALUE(
      logits_TV.stride(1) == 1 || logits_TV.size(1) <= 1, "selective_logprobs: got logits with column stride ",
      logits_TV.stride(1), ", expected 1 where the gradient is to be written over them");
  write_gradient(
      logits_TV, logits_TV, target_ids_T, entropy_T, stats_T2, grad_logprobs_T, grad_entropy_T, temperature, first_id);
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("selective_logprobs", &selective_logprobs);
  m.impl("fold_logits_", &fold_logits_);
  m.impl("selective_logprobs_backward", &selective_logprobs_backward);
  m.impl("selective_logprobs_backward_", &selective_logprobs_backward_);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
