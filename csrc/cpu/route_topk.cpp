// Expert selection. The scores are torch's own sigmoid and softmax, to the bit, so that the choice is the reference's
// wherever two scores are close. A vector holds one expert's score of several tokens: no branch depends on a score.
#include "../operator.h"
#include "../route.h"

#include <vector>

namespace r1fast {

struct RouteGradientArgs {
  at::ScalarType dtype;
  const void* logits;        // [T, E], of sigmoid
  const void* scores;        // [T, E], of softmax; else null
  const int64_t* ids;        // [T, K]
  const void* grad_weights;  // [T, K]
  int64_t num_experts, top_k;
  bool norm_topk_prob;
  double scale;
  void* grad;  // [T, E]
};

namespace {

// All bits where a goes before b: NaN before everything, as torch.sort has it. Equal: the lower id, which comes first.
template <typename acc>
inline Vec<acc> better(const Vec<acc>& a, const Vec<acc>& b) {
  return (a > b) | ((a != a) & (b == b));
}

// Puts a value with an id into a list of the best, and leaves in them what falls out at its end.
template <typename acc>
inline void insert(Vec<acc>& value, Vec<acc>& id, Vec<acc>* best, Vec<acc>* best_ids, int64_t count) {
  Vec<acc> moves(0);  // once something has moved, all behind it do
  for (int64_t k = 0; k < count; ++k) {
    const Vec<acc> here = best[k], id_here = best_ids[k];
    moves = moves | better<acc>(value, here);
    best[k] = Vec<acc>::blendv(here, value, moves);
    best_ids[k] = Vec<acc>::blendv(id_here, id, moves);
    value = Vec<acc>::blendv(value, here, moves);
    id = Vec<acc>::blendv(id, id_here, moves);
  }
}

// Chooses for as many tokens as a vector has lanes.
template <typename acc>
class Router {
 public:
  explicit Router(const RouteArgs& args)
      : args_(args), group_size_(args.num_experts / args.n_group), choice_(args.num_experts), groups_(args.n_group),
        best_(std::max(args.top_k, args.topk_group)), best_ids_(best_.size()) {}

  void choose(int64_t t, int64_t num_tokens) {
    load(static_cast<const acc*>(args_.scores) + t * args_.num_experts, num_tokens);
    if (args_.topk_group < args_.n_group) {
      leave_out_groups();
    }
    int64_t* ids = args_.ids + t * args_.top_k;
    select(choice_, args_.top_k);
    for (int64_t k = 0; k < args_.top_k; ++k) {
      for (int64_t lane = 0; lane < num_tokens; ++lane) {
        ids[lane * args_.top_k + k] = static_cast<int64_t>(lanes(best_ids_)[k * kLanes<acc> + lane]);
      }
    }
  }

 private:
  static acc* lanes(std::vector<Vec<acc>>& vectors) { return reinterpret_cast<acc*>(vectors.data()); }

  // Lanes without a token hold anything: nothing reads what is chosen there.
  void load(const acc* scores, int64_t num_tokens) {
    for (int64_t lane = 0; lane < num_tokens; ++lane) {
      for (int64_t e = 0; e < args_.num_experts; ++e) {
        lanes(choice_)[e * kLanes<acc> + lane] = scores[lane * args_.num_experts + e];
      }
    }
    if (args_.bias != nullptr) {
      for (int64_t e = 0; e < args_.num_experts; ++e) {
        choice_[e] = choice_[e] + Vec<acc>(static_cast<const acc*>(args_.bias)[e]);
      }
    }
  }

  void leave_out_groups() {
    const Vec<acc> lowest(-kInf<acc>);
    for (int64_t g = 0; g < args_.n_group; ++g) {
      const Vec<acc>* in_group = choice_.data() + g * group_size_;
      Vec<acc> first = in_group[0], second = lowest;
      for (int64_t i = 1; i < group_size_; ++i) {
        const Vec<acc> is_first = better<acc>(in_group[i], first);
        const Vec<acc> loser = Vec<acc>::blendv(in_group[i], first, is_first);
        first = Vec<acc>::blendv(first, in_group[i], is_first);
        second = Vec<acc>::blendv(second, loser, better<acc>(loser, second));
      }
      groups_[g] = group_size_ > 1 ? first + second : first;
    }
    select(groups_, args_.topk_group);
    for (int64_t g = 0; g < args_.n_group; ++g) {
      Vec<acc> allowed(0);
      for (int64_t k = 0; k < args_.topk_group; ++k) {
        allowed = allowed | (best_ids_[k] == Vec<acc>(static_cast<acc>(g)));
      }
      for (int64_t e = g * group_size_; e < (g + 1) * group_size_; ++e) {
        // -inf, not 0: a negative bias can push every allowed expert below 0.
        choice_[e] = Vec<acc>::blendv(lowest, choice_[e], allowed);
      }
    }
  }

  // The best `count` into best_ids_, best first.
  void select(const std::vector<Vec<acc>>& values, int64_t count) {
    constexpr int kNowhere = (1 << kLanes<acc>) - 1;
    for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
      Vec<acc> value = values[i], id(static_cast<acc>(i));
      if (i < count) {
        insert<acc>(value, id, best_.data(), best_ids_.data(), i);
        best_[i] = value;
        best_ids_[i] = id;
      } else if (better<acc>(value, best_[count - 1]).zero_mask() != kNowhere) {
        insert<acc>(value, id, best_.data(), best_ids_.data(), count);
      }
    }
  }

  const RouteArgs& args_;
  int64_t group_size_;
  std::vector<Vec<acc>> choice_, groups_, best_, best_ids_;
};

template <typename acc>
void route_rows(const RouteArgs& args, int64_t begin, int64_t end) {
  Router<acc> router(args);
  for (int64_t t = begin; t < end && !args.replays; t += kLanes<acc>) {
    router.choose(t, std::min(kLanes<acc>, end - t));
  }
  for (int64_t t = begin; t < end; ++t) {
    const acc* scores = static_cast<const acc*>(args.scores) + t * args.num_experts;
    const int64_t* ids = args.ids + t * args.top_k;
    acc* weights = static_cast<acc*>(args.weights) + t * args.top_k;
    acc sum = 0;
    for (int64_t k = 0; k < args.top_k; ++k) {
      weights[k] = scores[ids[k]];
      sum += weights[k];
    }
    const acc divisor = args.norm_topk_prob ? sum + static_cast<acc>(1e-20) : acc(1);
    for (int64_t k = 0; k < args.top_k; ++k) {
      weights[k] = weights[k] / divisor * static_cast<acc>(args.scale);
    }
  }
}

// The scores of the chosen experts, and with them the derivative of the weights.
template <typename acc>
void gradient_rows(const RouteGradientArgs& args, int64_t begin, int64_t end) {
  const bool softmax = args.scores != nullptr;
  const acc scale = static_cast<acc>(args.scale);
  std::vector<Vec<acc>> buffer((args.top_k + kLanes<acc> - 1) / kLanes<acc>, Vec<acc>(0));
  acc* s = reinterpret_cast<acc*>(buffer.data());
  for (int64_t t = begin; t < end; ++t) {
    const acc* row = static_cast<const acc*>(softmax ? args.scores : args.logits) + t * args.num_experts;
    const int64_t* ids = args.ids + t * args.top_k;
    const acc* upstream = static_cast<const acc*>(args.grad_weights) + t * args.top_k;
    acc* grad = static_cast<acc*>(args.grad) + t * args.num_experts;
    for (int64_t k = 0; k < args.top_k; ++k) {
      s[k] = row[ids[k]];
    }
    for (size_t i = 0; i < buffer.size() && !softmax; ++i) {
      buffer[i] = sigmoid<acc>(buffer[i]);
    }
    acc sum = static_cast<acc>(1e-20), weighted = 0;
    for (int64_t k = 0; k < args.top_k; ++k) {
      sum += s[k];
      weighted += upstream[k] * s[k];
    }
    const acc divisor = args.norm_topk_prob ? sum : acc(1);
    const acc mean = args.norm_topk_prob ? weighted / sum : acc(0);
    acc dot = 0;  // of the scores with their gradients: through the softmax's denominator it reaches every logit
    for (int64_t k = 0; k < args.top_k && softmax; ++k) {
      dot += (upstream[k] - mean) / divisor * scale * s[k];
    }
    for (int64_t e = 0; e < args.num_experts; ++e) {
      grad[e] = softmax ? -row[e] * dot : acc(0);
    }
    for (int64_t k = 0; k < args.top_k; ++k) {
      const acc of_score = (upstream[k] - mean) / divisor * scale;
      grad[ids[k]] += of_score * s[k] * (softmax ? acc(1) : 1 - s[k]);
    }
  }
}

}  // namespace

R1FAST_KERNEL(route_tokens, RouteArgs) {
  args.dtype == at::kDouble ? route_rows<double>(args, begin, end) : route_rows<float>(args, begin, end);
}

R1FAST_KERNEL(route_gradient, RouteGradientArgs) {
  args.dtype == at::kDouble ? gradient_rows<double>(args, begin, end) : gradient_rows<float>(args, begin, end);
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

at::Tensor scores_of(const at::Tensor& logits_TE, const std::string& scoring) {
  TORCH_CHECK_VALUE(
      scoring == "sigmoid" || scoring == "softmax", "route_topk: got scoring=", scoring,
      ", expected sigmoid or softmax");
  const at::Tensor logits = logits_TE.to(computed_in(logits_TE.scalar_type())).contiguous();
  return (scoring == "sigmoid" ? at::sigmoid(logits) : at::_softmax(logits, 1, false)).contiguous();
}

void check_ids(const at::Tensor& ids_TK, int64_t num_tokens, int64_t num_experts, const char* name) {
  check_tensor("route_topk", name, ids_TK, at::kLong, {num_tokens, -1});
  const int64_t* id = ids_TK.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids_TK.numel(); ++i) {
    TORCH_CHECK_VALUE(
        id[i] >= 0 && id[i] < num_experts, "route_topk: ", name, "[", i / ids_TK.size(1), ", ", i % ids_TK.size(1),
        "] is ", id[i], ", expected 0 <= id < ", num_experts);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_topk(
    const at::Tensor& logits_TE, const OptionalTensor& bias_E, const OptionalTensor& replay_ids_TK, int64_t top_k,
    int64_t n_group, int64_t topk_group, bool norm_topk_prob, double routed_scaling_factor, std::string scoring) {
  TORCH_CHECK_VALUE(logits_TE.dim() == 2, "route_topk: got logits ", logits_TE.sizes(), ", expected [T, E]");
  const int64_t num_tokens = logits_TE.size(0), num_experts = logits_TE.size(1);
  TORCH_CHECK_VALUE(
      n_group >= 1 && num_experts % n_group == 0 && topk_group >= 1 && topk_group <= n_group && top_k >= 1 &&
          top_k <= num_experts,
      "route_topk: got ", num_experts, " experts, top_k=", top_k, ", n_group=", n_group, ", topk_group=", topk_group,
      ", expected n_group to divide the experts, 1 <= topk_group <= n_group and 1 <= top_k <= experts");
  const at::Tensor scores_TE = scores_of(logits_TE, scoring);
  const auto dtype = scores_TE.scalar_type();
  const at::Tensor bias = bias_E ? bias_E->to(dtype).contiguous() : at::empty({num_experts}, scores_TE.options());
  check_tensor("route_topk", "bias_E", bias, dtype, {num_experts});
  at::Tensor ids_TK = at::empty({num_tokens, top_k}, scores_TE.options().dtype(at::kLong));
  if (replay_ids_TK) {
    ids_TK.copy_(*replay_ids_TK);
    check_ids(ids_TK, num_tokens, num_experts, "replay_ids_TK");
  }
  at::Tensor weights_TK = at::empty({num_tokens, top_k}, scores_TE.options());
  const RouteArgs args{
      dtype, scores_TE.const_data_ptr(), bias_E ? bias.const_data_ptr() : nullptr, num_experts, top_k,
      n_group, topk_group, norm_topk_prob, routed_scaling_factor, replay_ids_TK.has_value(),
      ids_TK.mutable_data_ptr<int64_t>(), weights_TK.mutable_data_ptr()};
  run_rows(R1FAST_PICK(route_tokens), args, num_tokens, num_experts);
  // One thread: integers add to the same in any order, and a million of them take a millisecond.
  at::Tensor counts_E = at::zeros({num_experts}, ids_TK.options());
  int64_t* counts = counts_E.mutable_data_ptr<int64_t>();
  const int64_t* ids = ids_TK.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids_TK.numel(); ++i) {
    ++counts[ids[i]];
  }
  return {ids_TK, weights_TK, counts_E};
}

at::Tensor route_topk_backward(
    const at::Tensor& logits_TE, const at::Tensor& expert_ids_TK, const at::Tensor& grad_weights_TK,
    bool norm_topk_prob, double routed_scaling_factor, std::string scoring) {
  const int64_t num_tokens = logits_TE.size(0), num_experts = logits_TE.size(1);
  const at::Tensor ids_TK = expert_ids_TK.contiguous();
  check_ids(ids_TK, num_tokens, num_experts, "expert_ids_TK");
  check_tensor(
      "route_topk_backward", "grad_weights_TK", grad_weights_TK, grad_weights_TK.scalar_type(), ids_TK.sizes());
  const auto dtype = computed_in(logits_TE.scalar_type());
  // Of a sigmoid only the chosen logits are needed.
  const at::Tensor logits = logits_TE.to(dtype).contiguous();
  const at::Tensor scores_TE = scoring == "sigmoid" ? at::Tensor() : scores_of(logits_TE, scoring);
  const at::Tensor grad_weights = grad_weights_TK.to(dtype).contiguous();
  at::Tensor grad_TE = at::empty({num_tokens, num_experts}, logits.options());
  const RouteGradientArgs args{
      dtype, logits.const_data_ptr(), scores_TE.defined() ? scores_TE.const_data_ptr() : nullptr,
      ids_TK.const_data_ptr<int64_t>(), grad_weights.const_data_ptr(), num_experts, ids_TK.size(1), norm_topk_prob,
      routed_scaling_factor, grad_TE.mutable_data_ptr()};
  run_rows(R1FAST_PICK(route_gradient), args, num_tokens, num_experts);
  return grad_TE.to(logits_TE.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("route_topk", &route_topk);
  m.impl("route_topk_backward", &route_topk_backward);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
