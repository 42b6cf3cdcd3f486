// Draws one token per row of logits: one pass over the row, then a second look at the block in which the draw falls.
// A truncated row also finds the smallest token that stays, without sorting, and is drawn from its masked copy.
//
// Rows are independent and each is summed in a fixed order: the same bits for any batch and number of threads.
#include "../operator.h"

#include <cmath>
#include <vector>

namespace r1fast {

struct SampleArgs {
  at::ScalarType dtype;
  const void* logits;    // [B, V], row stride `row_stride`, column stride 1
  const int64_t* seeds;  // [B], not read when greedy
  int64_t* ids;          // [B]
  float* logprobs;       // [B]
  int64_t row_stride, vocab;
  double temperature;  // 0: greedy
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
};

namespace {

constexpr int64_t kBlock = 2048;  // a block is swept twice and must stay in the L1 cache

// splitmix64 (Steele et al., 2014). 52 bits and not 53: u * total must stay below total after rounding.
inline double uniform(int64_t seed) {
  uint64_t x = static_cast<uint64_t>(seed) + 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  x = x ^ (x >> 31);
  return static_cast<double>(x >> 12) * 0x1p-52;
}

// A block of a row, in whole pairs of vectors: the row's own memory, or a copy padded with -inf at its end.
template <typename T>
struct Block {
  const T* x;
  int64_t size;
};

template <typename T>
inline Block<T> block_at(const T* x, int64_t vocab, int64_t start, T* padded) {
  const int64_t size = std::min(kBlock, vocab - start);
  if (size % kPair<acc_t<T>> == 0) {
    return {x + start, size};
  }
  const int64_t whole = size + kPair<acc_t<T>> - size % kPair<acc_t<T>>;
  std::fill(std::copy_n(x + start, size, padded), padded + whole, static_cast<T>(-kInf<acc_t<T>>));
  return {padded, whole};
}

// weight = e^((x - max) / temperature), handed to `use(i, a, b)` by pairs of vectors.
template <typename T, typename F>
inline void for_weights(const Block<T>& block, acc_t<T> max, acc_t<T> inverse_temperature, const F& use) {
  using acc = acc_t<T>;
  const Vec<acc> max_v(max);
  const Exponential<acc> weight_of(inverse_temperature);
  for (int64_t i = 0; i < block.size; i += kPair<acc>) {
    const auto [a, b] = load_pair(block.x + i);
    use(i, weight_of(a - max_v), weight_of(b - max_v));
  }
}

struct BlockSum {
  double max;
  double sum;  // of e^((x - max) / temperature)
};

template <typename T>
inline BlockSum sum_block(const Block<T>& block, acc_t<T> inverse_temperature) {
  using acc = acc_t<T>;
  Vec<acc> max_a(-kInf<acc>), max_b(-kInf<acc>), sum_a(0), sum_b(0);
  for (int64_t i = 0; i < block.size; i += kPair<acc>) {
    const auto [a, b] = load_pair(block.x + i);
    max_a = maximum(max_a, a);  // keeps NaN
    max_b = maximum(max_b, b);
  }
  const acc max = reduce_max<acc>(maximum(max_a, max_b));
  if (max == -kInf<acc>) {
    return {max, 0};  // -inf minus -inf would be NaN
  }
  for_weights(block, max, inverse_temperature, [&](int64_t, const Vec<acc>& a, const Vec<acc>& b) {
    sum_a = sum_a + a;
    sum_b = sum_b + b;
  });
  return {max, reduce_sum<acc>(sum_a + sum_b)};
}

// What stays of a row: values above `value`, and the first `ties` tokens that have it.
template <typename acc>
struct Cut {
  acc value = -kInf<acc>;
  int64_t ties = std::numeric_limits<int64_t>::max();

  // Asked in the order of the tokens. No branches, here and in loops below: half of them would be guessed wrong.
  bool keeps(acc x) {
    const bool tie = x == value;
    ties -= tie;
    return (x > value) | (tie & (ties >= 0));
  }
};

template <typename acc>
struct Candidate {
  acc value;
  acc weight;
};

template <typename acc>
inline acc median_of_three(const Candidate<acc>* c, int64_t size) {
  // Scattered places: a sorted row must not be the worst case.
  const auto at = [&](uint64_t salt) { return c[(size * 0x9E3779B97F4A7C15 + salt) % size].value; };
  const acc x = at(0), y = at(0xBF58476D1CE4E5B9), z = at(0x94D049BB133111EB);
  return std::max(std::min(x, y), std::min(std::max(x, y), z));
}

// Quickselect: the cut that keeps a token while `measure` summed over those before it, larger values first and ties in
// the order of the tokens, is short of `target`. Both arrays of `size` are written over.
template <typename acc, typename F>
Cut<acc> select(Candidate<acc>* from, Candidate<acc>* to, int64_t size, double target, const F& measure) {
  double before = 0;  // of those known to stay
  while (size > 0) {
    const acc pivot = median_of_three(from, size);
    double above = 0, tie = 0;
    int64_t low = 0, high = size;  // larger values go to the front of `to`, smaller ones to its end
    for (int64_t i = 0; i < size; ++i) {
      const Candidate<acc> candidate = from[i];
      const bool larger = candidate.value > pivot, smaller = candidate.value < pivot;
      to[low] = candidate;
      to[high - 1] = candidate;
      low += larger;
      high -= smaller;
      above += larger * measure(candidate);
      tie = larger | smaller ? tie : measure(candidate);
    }
    const double until_ties = before + above;
    if (until_ties >= target) {
      size = low;
      std::swap(from, to);
    } else if (until_ties + (high - low) * tie >= target) {
      return {pivot, static_cast<int64_t>(std::ceil((target - until_ties) / tie))};
    } else {
      before = until_ties + (high - low) * tie;
      size -= high;
      std::swap(from, to);
      from += high;
    }
  }
  return {};  // rounding: all of them are short of the target
}

template <typename T>
class Sampler {
  using acc = acc_t<T>;

 public:
  explicit Sampler(const SampleArgs& args)
      : vocab_(args.vocab), top_k_(args.top_k < args.vocab ? args.top_k : 0), top_p_(args.top_p),
        greedy_(args.temperature == 0), temperature_(greedy_ ? 1 : args.temperature),
        // Bounded: 0 * inf would make the largest logit of a nearly greedy row NaN.
        inverse_(std::min<double>(1 / temperature_, std::numeric_limits<acc>::max())),
        blocks_((vocab_ + kBlock - 1) / kBlock) {}

  void row(const T* x, const int64_t* seed, int64_t& id, float& logprob) {
    const double total = sum(x);
    id = 0;
    logprob = std::numeric_limits<float>::quiet_NaN();
    if (!(total > 0)) {
      return;  // a NaN, +inf, or no token to draw
    }
    id = greedy_ ? first_largest(x) : draw(x, total, uniform(*seed));
    const double distance = static_cast<acc>(x[id]) - max_;
    logprob = static_cast<float>(distance / temperature_ - std::log(total));
  }

 private:
  // The block sums and the row's maximum; returns the sum of the row.
  double sum(const T* x) {
    max_ = -kInf<double>;
    for (size_t b = 0; b < blocks_.size(); ++b) {
      blocks_[b] = sum_block(block_at(x, vocab_, b * kBlock, padded_), inverse_);
      max_ = std::max(max_, blocks_[b].max);
    }
    double total = 0;
    for (const BlockSum& block : blocks_) {
      total += in_row(block);
    }
    return total;
  }

  // A block's share of the row's sum. Double: in float, tokens of a 150k vocabulary would merge.
  double in_row(const BlockSum& block) const {
    return block.sum == 0 ? 0 : block.sum * std::exp((block.max - max_) / temperature_);
  }

  int64_t first_largest(const T* x) const {
    size_t b = 0;
    while (blocks_[b].max != max_) {
      ++b;
    }
    return std::find(x + b * kBlock, x + vocab_, static_cast<T>(max_)) - x;
  }

  int64_t draw(const T* x, double total, double u) {
    if (top_k_ == 0 && top_p_ >= 1) {
      return invert(x, u * total);
    }
    candidates_.resize(vocab_);
    other_.resize(vocab_);
    Cut<acc> cut;
    if (top_k_ > 0) {
      const auto one = [](const Candidate<acc>&) { return 1.0; };
      cut = select(candidates_.data(), other_.data(), gather(x, cut, 0, total), top_k_, one);
    }
    if (top_p_ < 1) {
      // All tokens below this weight together hold less than 1 - top_p, so none of them stays.
      const double lightest = top_k_ > 0 ? 0 : (1 - top_p_) * total / (2 * vocab_);
      const int64_t size = gather(x, cut, lightest, total);
      const auto weight = [](const Candidate<acc>& c) { return static_cast<double>(c.weight); };
      cut = select(candidates_.data(), other_.data(), size, top_p_ * total, weight);
    }
    mask(x, cut);
    const double kept_total = sum(kept_.data());
    return invert(kept_.data(), u * kept_total);
  }

  // The row with -inf where a token is cut off. Two loops: the compiler turns the first into vectors.
  void mask(const T* x, Cut<acc> cut) {
    kept_.resize(vocab_);
    T* kept = kept_.data();
    for (int64_t v = 0; v < vocab_; ++v) {
      kept[v] = static_cast<acc>(x[v]) > cut.value ? x[v] : static_cast<T>(-kInf<acc>);
    }
    for (int64_t v = 0; v < vocab_ && cut.ties > 0; ++v) {
      if (static_cast<acc>(x[v]) == cut.value) {
        kept[v] = x[v];
        --cut.ties;
      }
    }
  }

  // The tokens that the cut keeps, but for those of `lightest` weight or less; returns their number, and their mass.
  int64_t gather(const T* x, Cut<acc> cut, double lightest, double& mass) {
    int64_t size = 0;
    mass = 0;
    for (int64_t start = 0; start < vocab_; start += kBlock) {
      weigh(block_at(x, vocab_, start, padded_), max_);
      for (int64_t i = 0; i < std::min(kBlock, vocab_ - start); ++i) {
        const acc value = static_cast<acc>(x[start + i]);
        const bool kept = cut.keeps(value);
        candidates_[size] = {value, weights_[i]};
        size += kept & (weights_[i] > lightest);
        mass += kept * weights_[i];
      }
    }
    return size;
  }

  void weigh(const Block<T>& block, acc max) {
    for_weights(block, max, inverse_, [&](int64_t i, const Vec<acc>& a, const Vec<acc>& b) {
      store_pair(weights_ + i, a, b);
    });
  }

  // The first token at which the running sum of the row exceeds `target`.
  int64_t invert(const T* x, double target) {
    size_t last = 0;  // block that holds anything
    for (size_t b = 0; b < blocks_.size(); ++b) {
      const double share = in_row(blocks_[b]);
      if (share == 0) {
        continue;
      }
      last = b;
      if (target < share) {
        break;
      }
      target -= share;
    }
    const int64_t start = last * kBlock;
    weigh(block_at(x, vocab_, start, padded_), blocks_[last].max);
    target /= std::exp((blocks_[last].max - max_) / temperature_);
    double running = 0;
    int64_t id = start;
    for (int64_t i = 0; i < std::min(kBlock, vocab_ - start) && running <= target; ++i) {
      running += weights_[i];
      id = weights_[i] > 0 ? start + i : id;  // at the end, rounding may leave the sum short of the target
    }
    return id;
  }

  const int64_t vocab_, top_k_;
  const double top_p_;
  const bool greedy_;
  const double temperature_;
  const acc inverse_;
  double max_ = 0;
  std::vector<BlockSum> blocks_;
  std::vector<Candidate<acc>> candidates_, other_;
  std::vector<T> kept_;
  T padded_[kBlock];
  acc weights_[kBlock];
};

}  // namespace

R1FAST_KERNEL(sample_tokens, SampleArgs) {
  by_dtype(args.dtype, [&]<typename T>() {
    Sampler<T> sampler(args);
    for (int64_t b = begin; b < end; ++b) {
      const T* x = static_cast<const T*>(args.logits) + b * args.row_stride;
      sampler.row(x, args.seeds + b, args.ids[b], args.logprobs[b]);
    }
  });
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

std::tuple<at::Tensor, at::Tensor> sample_tokens(
    const at::Tensor& logits_BV, const OptionalTensor& seeds_B, double temperature, int64_t top_k, double top_p) {
  const int64_t num_rows = logits_BV.size(0);
  check_floats("sample_tokens", {logits_BV});
  check_tensor("sample_tokens", "logits_BV", logits_BV, logits_BV.scalar_type(), {-1, -1});
  TORCH_CHECK_VALUE(temperature == 0 || seeds_B, "sample_tokens: got no seeds_B to draw with");
  if (seeds_B) {
    check_tensor("sample_tokens", "seeds_B", *seeds_B, at::kLong, {num_rows});
  }
  const at::Tensor logits = with_unit_columns(logits_BV);
  const at::Tensor seeds = seeds_B ? seeds_B->contiguous() : at::Tensor();
  at::Tensor ids = at::empty({num_rows}, logits.options().dtype(at::kLong));
  at::Tensor logprobs = at::empty({num_rows}, logits.options().dtype(at::kFloat));
  const SampleArgs args{
      logits.scalar_type(), logits.const_data_ptr(), seeds_B ? seeds.const_data_ptr<int64_t>() : nullptr,
      ids.mutable_data_ptr<int64_t>(), logprobs.mutable_data_ptr<float>(), logits.stride(0), logits.size(1),
      temperature, top_k, top_p};
  run_rows(R1FAST_PICK(sample_tokens), args, num_rows, args.vocab);
  return {ids, logprobs};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("sample_tokens", &sample_tokens);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
