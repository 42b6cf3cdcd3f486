// Expert selection, token by token. The scores are torch's own sigmoid and softmax, to the bit, so that the choice is
// the reference's wherever two scores are close.
#ifdef R1FAST_BUILD_OPERATOR

#include "../simd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace r1fast {
namespace {

// From here on a sort of all beats keeping a sorted list of the best.
constexpr int64_t kListed = 32;

struct Routing {
  int64_t num_experts, top_k, n_group, topk_group;
  bool norm_topk_prob;
  double scale;
};

// NaN before everything, as torch.sort has it; equal values: the lower id, which is seen first.
template <typename acc>
inline bool better(acc a, acc b) {
  return a > b || (std::isnan(a) && !std::isnan(b));
}

// The ids of the best `count` of `size` values, best first.
template <typename acc>
class Selection {
 public:
  Selection(int64_t size, int64_t count) : size_(size), count_(count), values_(count), all_(count > kListed ? size : 0) {}

  void operator()(const acc* values, int64_t* ids) {
    if (count_ > kListed) {
      std::iota(all_.begin(), all_.end(), 0);
      std::partial_sort(all_.begin(), all_.begin() + count_, all_.end(), [values](int64_t a, int64_t b) {
        return better(values[a], values[b]) || (!better(values[b], values[a]) && a < b);
      });
      std::copy_n(all_.begin(), count_, ids);
      return;
    }
    int64_t found = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const acc value = values[i];
      if (found == count_ && !better(value, values_[count_ - 1])) {
        continue;
      }
      int64_t place = found < count_ ? found++ : count_ - 1;
      for (; place > 0 && better(value, values_[place - 1]); --place) {
        values_[place] = values_[place - 1];
        ids[place] = ids[place - 1];
      }
      values_[place] = value;
      ids[place] = i;
    }
  }

 private:
  int64_t size_, count_;
  std::vector<acc> values_;
  std::vector<int64_t> all_;
};

template <typename acc>
class Router {
 public:
  Router(const Routing& routing, const acc* bias)
      : routing_(routing), bias_(bias), group_size_(routing.num_experts / routing.n_group),
        limited_(routing.topk_group < routing.n_group), choice_(routing.num_experts), group_scores_(routing.n_group),
        groups_(routing.topk_group), allowed_(routing.n_group), best_experts_(routing.num_experts, routing.top_k),
        best_groups_(routing.n_group, routing.topk_group) {}

  void choose(const acc* scores, int64_t* ids) {
    const acc* choice = scores;
    if (bias_ != nullptr || limited_) {
      for (int64_t e = 0; e < routing_.num_experts; ++e) {
        choice_[e] = bias_ == nullptr ? scores[e] : scores[e] + bias_[e];
      }
      choice = choice_.data();
    }
    if (limited_) {
      leave_out_groups();
    }
    best_experts_(choice, ids);
  }

  void weigh(const acc* scores, const int64_t* ids, acc* weights) const {
    acc sum = 0;
    for (int64_t k = 0; k < routing_.top_k; ++k) {
      weights[k] = scores[ids[k]];
      sum += weights[k];
    }
    const acc divisor = routing_.norm_topk_prob ? sum + static_cast<acc>(1e-20) : acc(1);
    for (int64_t k = 0; k < routing_.top_k; ++k) {
      weights[k] = weights[k] / divisor * static_cast<acc>(routing_.scale);
    }
  }

 private:
  void leave_out_groups() {
    constexpr acc kLowest = -std::numeric_limits<acc>::infinity();
    for (int64_t g = 0; g < routing_.n_group; ++g) {
      const acc* in_group = choice_.data() + g * group_size_;
      acc first = in_group[0], second = kLowest;
      for (int64_t i = 1; i < group_size_; ++i) {
        if (better(in_group[i], first)) {
          second = first;
          first = in_group[i];
        } else if (better(in_group[i], second)) {
          second = in_group[i];
        }
      }
      group_scores_[g] = group_size_ > 1 ? first + second : first;
    }
    best_groups_(group_scores_.data(), groups_.data());
    std::fill(allowed_.begin(), allowed_.end(), 0);
    for (const int64_t g : groups_) {
      allowed_[g] = 1;
    }
    for (int64_t g = 0; g < routing_.n_group; ++g) {
      if (!allowed_[g]) {
        std::fill_n(choice_.begin() + g * group_size_, group_size_, kLowest);
      }
    }
  }

  Routing routing_;
  const acc* bias_;
  int64_t group_size_;
  bool limited_;
  std::vector<acc> choice_, group_scores_;
  std::vector<int64_t> groups_;
  std::vector<char> allowed_;
  Selection<acc> best_experts_, best_groups_;
};

at::ScalarType acc_dtype(const at::Tensor& logits_TE) {
  return logits_TE.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor scores_of(const at::Tensor& logits_TE, const std::string& scoring) {
  TORCH_CHECK_VALUE(
      scoring == "sigmoid" || scoring == "softmax", "route_topk: got scoring=", scoring,
      ", expected sigmoid or softmax");
  const at::Tensor logits = logits_TE.to(acc_dtype(logits_TE)).contiguous();
  return (scoring == "sigmoid" ? at::sigmoid(logits) : at::_softmax(logits, 1, false)).contiguous();
}

void check_ids(const at::Tensor& ids_TK, int64_t num_tokens, int64_t num_experts, const char* name) {
  TORCH_CHECK_VALUE(
      ids_TK.dim() == 2 && ids_TK.size(0) == num_tokens && ids_TK.scalar_type() == at::kLong, "route_topk: got ", name,
      " of shape ", ids_TK.sizes(), " and dtype ", ids_TK.scalar_type(), ", expected int64 [", num_tokens, ", K]");
  const int64_t* id = ids_TK.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids_TK.numel(); ++i) {
    TORCH_CHECK_VALUE(
        id[i] >= 0 && id[i] < num_experts, "route_topk: ", name, "[", i / ids_TK.size(1), ", ", i % ids_TK.size(1),
        "] is ", id[i], ", expected 0 <= id < ", num_experts);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_topk(
    const at::Tensor& logits_TE, const std::optional<at::Tensor>& bias_E,
    const std::optional<at::Tensor>& replay_ids_TK, int64_t top_k, int64_t n_group, int64_t topk_group,
    bool norm_topk_prob, double routed_scaling_factor, std::string scoring) {
  TORCH_CHECK_VALUE(logits_TE.dim() == 2, "route_topk: got logits ", logits_TE.sizes(), ", expected [T, E]");
  const int64_t num_tokens = logits_TE.size(0), num_experts = logits_TE.size(1);
  TORCH_CHECK_VALUE(
      n_group >= 1 && num_experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group && top_k >= 1 &&
          top_k <= num_experts,
      "route_topk: got ", num_experts, " experts, top_k=", top_k, ", n_group=", n_group, ", topk_group=", topk_group,
      ", expected n_group to divide the experts, 1 <= topk_group <= n_group and 1 <= top_k <= experts");
  TORCH_CHECK_VALUE(
      !bias_E || bias_E->numel() == num_experts, "route_topk: got a bias ", bias_E ? bias_E->sizes() : at::IntArrayRef(),
      ", expected [", num_experts, "]");
  const at::Tensor scores_TE = scores_of(logits_TE, scoring);
  const at::Tensor bias = bias_E ? bias_E->to(scores_TE.scalar_type()).contiguous() : at::Tensor();
  at::Tensor ids_TK = at::empty({num_tokens, top_k}, scores_TE.options().dtype(at::kLong));
  if (replay_ids_TK) {
    ids_TK.copy_(*replay_ids_TK);
    check_ids(ids_TK, num_tokens, num_experts, "replay_ids_TK");
  }
  at::Tensor weights_TK = at::empty({num_tokens, top_k}, scores_TE.options());
  const Routing routing{num_experts, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor};
  AT_DISPATCH_FLOATING_TYPES(scores_TE.scalar_type(), "route_topk", [&] {
    const scalar_t* scores = scores_TE.const_data_ptr<scalar_t>();
    int64_t* ids = ids_TK.mutable_data_ptr<int64_t>();
    scalar_t* weights = weights_TK.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_tokens, rows_per_task(num_experts), [&](int64_t begin, int64_t end) {
      Router<scalar_t> router(routing, bias_E ? bias.const_data_ptr<scalar_t>() : nullptr);
      for (int64_t t = begin; t < end; ++t) {
        if (!replay_ids_TK) {
          router.choose(scores + t * num_experts, ids + t * top_k);
        }
        router.weigh(scores + t * num_experts, ids + t * top_k, weights + t * top_k);
      }
    });
  });
  // One thread: integers add to the same in any order, and a million of them take a millisecond.
  at::Tensor counts_E = at::zeros({num_experts}, ids_TK.options());
  int64_t* counts = counts_E.mutable_data_ptr<int64_t>();
  const int64_t* ids = ids_TK.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids_TK.numel(); ++i) {
    ++counts[ids[i]];
  }
  return {ids_TK, weights_TK, counts_E};
}

// d weights / d chosen scores of a token; then the scores' own derivative, over the chosen or over all logits.
template <typename acc>
void gradient_row(
    const acc* scores, const int64_t* ids, const acc* grad_weights, const Routing& routing, bool sigmoid, acc* grad_k,
    acc* grad) {
  const acc scale = static_cast<acc>(routing.scale);
  acc sum = static_cast<acc>(1e-20), weighted = 0;
  if (routing.norm_topk_prob) {
    for (int64_t k = 0; k < routing.top_k; ++k) {
      sum += scores[ids[k]];
      weighted += grad_weights[k] * scores[ids[k]];
    }
  }
  acc dot = 0;
  for (int64_t k = 0; k < routing.top_k; ++k) {
    const acc upstream = routing.norm_topk_prob ? (grad_weights[k] - weighted / sum) / sum : grad_weights[k];
    grad_k[k] = upstream * scale;
    dot += grad_k[k] * scores[ids[k]];
  }
  for (int64_t e = 0; e < routing.num_experts; ++e) {
    grad[e] = sigmoid ? acc(0) : -scores[e] * dot;
  }
  for (int64_t k = 0; k < routing.top_k; ++k) {
    const acc s = scores[ids[k]];
    grad[ids[k]] += sigmoid ? grad_k[k] * s * (1 - s) : grad_k[k] * s;
  }
}

at::Tensor route_topk_backward(
    const at::Tensor& logits_TE, const at::Tensor& expert_ids_TK, const at::Tensor& grad_weights_TK,
    bool norm_topk_prob, double routed_scaling_factor, std::string scoring) {
  TORCH_CHECK_VALUE(logits_TE.dim() == 2, "route_topk_backward: got logits ", logits_TE.sizes(), ", expected [T, E]");
  const int64_t num_tokens = logits_TE.size(0), num_experts = logits_TE.size(1);
  const at::Tensor ids_TK = expert_ids_TK.contiguous();
  check_ids(ids_TK, num_tokens, num_experts, "expert_ids_TK");
  TORCH_CHECK_VALUE(
      grad_weights_TK.sizes() == ids_TK.sizes(), "route_topk_backward: got gradients ", grad_weights_TK.sizes(),
      ", expected ", ids_TK.sizes());
  const at::Tensor scores_TE = scores_of(logits_TE, scoring);
  const at::Tensor grad_weights = grad_weights_TK.to(scores_TE.scalar_type()).contiguous();
  at::Tensor grad_TE = at::empty({num_tokens, num_experts}, scores_TE.options());
  const int64_t top_k = ids_TK.size(1);
  const Routing routing{num_experts, top_k, 1, 1, norm_topk_prob, routed_scaling_factor};
  const bool sigmoid = scoring == "sigmoid";
  AT_DISPATCH_FLOATING_TYPES(scores_TE.scalar_type(), "route_topk_backward", [&] {
    const scalar_t* scores = scores_TE.const_data_ptr<scalar_t>();
    const scalar_t* upstream = grad_weights.const_data_ptr<scalar_t>();
    const int64_t* ids = ids_TK.const_data_ptr<int64_t>();
    scalar_t* grad = grad_TE.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_tokens, rows_per_task(num_experts), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> grad_k(top_k);
      for (int64_t t = begin; t < end; ++t) {
        gradient_row(
            scores + t * num_experts, ids + t * top_k, upstream + t * top_k, routing, sigmoid, grad_k.data(),
            grad + t * num_experts);
      }
    });
  });
  return grad_TE.to(logits_TE.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("route_topk", &route_topk);
  m.impl("route_topk_backward", &route_topk_backward);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
