// Log-probability of one token per row and entropy of the row, from logits, in one pass over memory.
//
// Built three times (setup.py): plain, AVX2 and AVX512, each into its own namespace; the plain build also holds the
// operator, which picks one when it runs. Rows are independent and each is folded in a fixed order, so the result has
// the same bits for any number of threads.
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace r1fast {

struct SelectiveLogprobsArgs {
  const float* logits;        // [T, V], row stride `row_stride`, column stride 1
  const int64_t* target_ids;  // [T]
  float* logprobs;            // [T]
  float* entropy;             // [T], or null: not wanted
  float* stats;               // [T, 2]: max of z and log sum exp(z - max), with z = logits / temperature
  int64_t row_stride;
  int64_t vocab;
  float temperature;
};

void selective_logprobs_AVX2(const SelectiveLogprobsArgs& args, int64_t begin, int64_t end);
void selective_logprobs_AVX512(const SelectiveLogprobsArgs& args, int64_t begin, int64_t end);
void selective_logprobs_DEFAULT(const SelectiveLogprobsArgs& args, int64_t begin, int64_t end);

namespace {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
// The second sweep over a block must find it in the L1 cache (32-48 KB): 2048 floats are 8 KB.
constexpr int64_t kBlock = 2048;
constexpr float kInf = std::numeric_limits<float>::infinity();

// Running (max, sum e^(z-max), sum (z-max) e^(z-max)) of one row. Sums of blocks are added in double: a vocabulary of
// 150k would otherwise lose three digits.
struct RowState {
  float max = -kInf;
  double sum = 0;
  double weighted = 0;
};

inline float reduce_sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

inline float reduce_max(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, v);
}

// `size` is a multiple of the vector width. kTempered: a vector division costs more than half of an exponential, so
// temperature 1 goes without.
template <bool kEntropy, bool kTempered>
inline void fold_block(const float* x, int64_t size, const Vec& temperature, float scale, RowState& row) {
  Vec block_max(-kInf);
  for (int64_t i = 0; i < size; i += kLanes) {
    block_max = at::vec::maximum(block_max, Vec::loadu(x + i));  // keeps NaN
  }
  // Division is monotonic: the maximum of x / T is (max x) / T to the bit.
  const float top = reduce_max(block_max) / scale;
  if (top == -kInf) {
    return;  // a masked block adds nothing, and -inf minus -inf would be NaN
  }
  if (!(top <= row.max)) {  // also when top is NaN
    const double shift = static_cast<double>(row.max) - top;
    if (row.sum > 0) {
      const double factor = std::exp(shift);
      row.weighted = factor * (row.weighted + shift * row.sum);
      row.sum *= factor;
    }
    row.max = top;
  }
  const Vec max(row.max);
  const Vec lowest(std::numeric_limits<float>::lowest());
  Vec sum(0.f);
  Vec weighted(0.f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec logits = Vec::loadu(x + i);
    const Vec distance = (kTempered ? logits / temperature : logits) - max;
    const Vec weight = distance.exp();
    sum = sum + weight;
    if constexpr (kEntropy) {
      // A masked logit has distance -inf and weight 0: clamp it so that their product is 0, not NaN.
      weighted = weighted + weight * at::vec::maximum(distance, lowest);
    }
  }
  row.sum += reduce_sum(sum);
  if constexpr (kEntropy) {
    row.weighted += reduce_sum(weighted);
  }
}

template <bool kEntropy, bool kTempered>
void fold_rows(const SelectiveLogprobsArgs& args, int64_t begin, int64_t end) {
  const Vec temperature(args.temperature);
  const int64_t whole = args.vocab - args.vocab % kLanes;
  for (int64_t t = begin; t < end; ++t) {
    const float* x = args.logits + t * args.row_stride;
    RowState row;
    for (int64_t i = 0; i < whole; i += kBlock) {
      fold_block<kEntropy, kTempered>(x + i, std::min(kBlock, whole - i), temperature, args.temperature, row);
    }
    if (whole < args.vocab) {
      float tail[kLanes];
      std::fill(tail, tail + kLanes, -kInf);
      std::copy(x + whole, x + args.vocab, tail);
      fold_block<kEntropy, kTempered>(tail, kLanes, temperature, args.temperature, row);
    }
    const double log_sum = std::log(row.sum);
    const float target = x[args.target_ids[t]] / args.temperature;
    // (z - max) first: with logits near -1e4, fp32 z - lse would lose four digits.
    args.logprobs[t] = static_cast<float>((static_cast<double>(target) - row.max) - log_sum);
    args.stats[2 * t] = row.max;
    args.stats[2 * t + 1] = static_cast<float>(log_sum);
    if constexpr (kEntropy) {
      args.entropy[t] = static_cast<float>(log_sum - row.weighted / row.sum);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace

#define R1FAST_PASTE_(a, b) a##b
#define R1FAST_PASTE(a, b) R1FAST_PASTE_(a, b)
void R1FAST_PASTE(selective_logprobs_, CPU_CAPABILITY)(const SelectiveLogprobsArgs& args, int64_t begin, int64_t end) {
  const bool entropy = args.entropy != nullptr;
  const bool tempered = args.temperature != 1.f;
  if (entropy) {
    tempered ? fold_rows<true, true>(args, begin, end) : fold_rows<true, false>(args, begin, end);
  } else {
    tempered ? fold_rows<false, true>(args, begin, end) : fold_rows<false, false>(args, begin, end);
  }
}

}  // namespace r1fast

#ifdef R1FAST_BUILD_OPERATOR

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <tuple>

namespace r1fast {
namespace {

using Kernel = void (*)(const SelectiveLogprobsArgs&, int64_t, int64_t);

Kernel pick_kernel() {
#ifdef R1FAST_BUILD_X86
  const std::string capability = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
  if (capability == "AVX512") {
    return selective_logprobs_AVX512;
  }
  if (capability == "AVX2") {
    return selective_logprobs_AVX2;
  }
#endif
  return selective_logprobs_DEFAULT;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> selective_logprobs(
    const at::Tensor& logits_TV,
    const at::Tensor& target_ids_T,
    double temperature,
    bool with_entropy) {
  TORCH_CHECK_VALUE(
      logits_TV.dim() == 2 && logits_TV.scalar_type() == at::kFloat,
      "selective_logprobs: got logits of shape ", logits_TV.sizes(), " and dtype ", logits_TV.scalar_type(),
      ", expected float32 [T, V]; other dtypes take impl=\"reference\"");
  const int64_t num_tokens = logits_TV.size(0);
  const int64_t vocab = logits_TV.size(1);
  TORCH_CHECK_VALUE(
      target_ids_T.dim() == 1 && target_ids_T.size(0) == num_tokens && target_ids_T.scalar_type() == at::kLong,
      "selective_logprobs: got target ids of shape ", target_ids_T.sizes(), " and dtype ", target_ids_T.scalar_type(),
      ", expected int64 [", num_tokens, "]");
  const at::Tensor logits = logits_TV.stride(1) == 1 || vocab == 1 ? logits_TV : logits_TV.contiguous();
  const at::Tensor ids = target_ids_T.contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    TORCH_CHECK_INDEX(
        id[t] >= 0 && id[t] < vocab,
        "selective_logprobs: target_ids_T[", t, "] is ", id[t], ", expected 0 <= id < ", vocab,
        "; drop ignored positions before the call");
  }
  at::Tensor logprobs = at::empty({num_tokens}, logits.options());
  at::Tensor entropy = at::empty({with_entropy ? num_tokens : 0}, logits.options());
  at::Tensor stats = at::empty({num_tokens, 2}, logits.options());
  const SelectiveLogprobsArgs args{
      logits.const_data_ptr<float>(), id,
      logprobs.mutable_data_ptr<float>(), with_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
      stats.mutable_data_ptr<float>(), logits.stride(0), vocab, static_cast<float>(temperature)};
  static const Kernel kernel = pick_kernel();
  // About 32k elements a task: 10-20 us, enough to pay for waking a thread.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(vocab, 1));
  at::parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {logprobs, entropy, stats};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("selective_logprobs", &selective_logprobs);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
