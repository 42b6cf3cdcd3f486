// The routed experts, forward and backward, slice by slice (moe.h): each thread takes rows of one expert through all
// steps, from the gathered inputs to the rows that the tokens will sum, in buffers of its own that stay in the cache.
//
//   forward    x = hidden[token]    [g u] = x gate_up^T    a = silu(g) u w    y = a down^T       out = sum of y
//   backward   dy = grad_out[token]    da = dy down    d_w = <da, h>    [dg du]    dx = [dg du] gate_up    and sums
#ifdef R1FAST_BUILD_OPERATOR

#include "../moe.h"

namespace r1fast {
namespace {

struct Layer {
  at::Tensor hidden_TD, gate_up_E2FD, down_EDF, weights_TK;  // contiguous; weights in fp32, or fp64 of fp64
  at::ScalarType storage, inner;
  int64_t num_tokens, top_k, width, inner_width;  // T, K, D, F

  Layer(const at::Tensor& hidden, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& weights)
      : hidden_TD(hidden.contiguous()), gate_up_E2FD(gate_up.contiguous()), down_EDF(down.contiguous()) {
    storage = hidden.scalar_type();
    inner = inner_dtype(storage);
    num_tokens = hidden.size(0);
    top_k = weights.size(1);
    width = hidden.size(1);
    inner_width = down.size(2);
    check_floats("moe_experts", {hidden, gate_up, down});
    check_tensor("moe_experts", "gate_up", gate_up, storage, {down.size(0), 2 * inner_width, width});
    check_tensor("moe_experts", "down", down, storage, {-1, width, -1});
    check_tensor("moe_experts", "weights", weights, weights.scalar_type(), {num_tokens, -1});
    weights_TK = weights.to(computed_in(storage)).contiguous();
  }

  // What the tokens of the choices order[0..rows] have in rows_TD.
  Matrix gather(const at::Tensor& rows_TD, const int32_t* order, int64_t rows, Buffer& buffer) const {
    const Matrix out = buffer.get(rows, width, inner);
    R1FAST_PICK(moe_gather)({rows_of(rows_TD), out, order, top_k}, 0, rows);
    return out;
  }

  at::Tensor gather_sum(const at::Tensor& rows_MD, const at::Tensor& slot_TK) const {
    at::Tensor out_TD = at::empty({num_tokens, width}, hidden_TD.options());
    const GatherSumArgs args{rows_of(rows_MD), rows_of(out_TD), slot_TK.const_data_ptr<int32_t>(), top_k};
    run_rows(R1FAST_PICK(moe_gather_sum), args, num_tokens, width * top_k);
    return out_TD;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_experts(
    const at::Tensor& hidden, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& expert_ids_TK,
    const at::Tensor& weights, bool keep) {
  const Layer layer(hidden, gate_up, down, weights);
  check_tensor("moe_experts", "expert_ids_TK", expert_ids_TK, at::kLong, weights.sizes());
  const auto [order_M, slot_TK, offsets_E] = sort_by_expert("moe_experts", expert_ids_TK, gate_up.size(0));
  const auto inner = layer.inner;
  const int64_t num_choices = expert_ids_TK.numel(), inner_width = layer.inner_width;
  const Slices slices("moe_experts", offsets_E, num_choices, inner);
  at::Tensor gate_up_M2F = at::empty({0}, layer.hidden_TD.options());
  if (keep) {
    gate_up_M2F = at::empty({num_choices, 2 * inner_width}, layer.hidden_TD.options());
    set_zero(rows_of(gate_up_M2F).slice(slices.num_rows, num_choices));
  }
  const bool in_place = keep && layer.storage == inner;
  const at::Tensor out_MD = at::empty({slices.num_rows, layer.width}, layer.hidden_TD.options().dtype(inner));
  const int32_t* all_order = order_M.const_data_ptr<int32_t>();
  struct Memory {
    Buffer x, gate_up, activation;
    ExpertWeight gate_up_weight, down_weight;
  };
  for_pieces<Memory>(slices, [&](Memory& memory, const Slice& slice, int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    const int32_t* order = all_order + begin;
    const Matrix kept = keep ? rows_of(gate_up_M2F).slice(begin, end) : Matrix{};
    const Matrix x = layer.gather(layer.hidden_TD, order, rows, memory.x);
    const Matrix both = in_place ? kept : memory.gate_up.get(rows, 2 * inner_width, inner);
    const Matrix activation = memory.activation.get(rows, inner_width, inner);
    multiply(both, x, memory.gate_up_weight.of(layer.gate_up_E2FD, slice.expert, inner).t());
    R1FAST_PICK(moe_swiglu)
    ({both, in_place ? Matrix{} : kept, activation, layer.weights_TK.const_data_ptr(), order}, 0, rows);
    multiply(rows_of(out_MD).slice(begin, end), activation,
             memory.down_weight.of(layer.down_EDF, slice.expert, inner).t());
  });
  return {layer.gather_sum(out_MD, slot_TK), order_M, slot_TK, offsets_E, gate_up_M2F};
}

// What a backward pass reads and writes; null or undefined what is not needed.
struct Backward {
  const Layer& layer;
  const at::Tensor grad_out_TD, gate_up_M2F;
  const int32_t* order;
  at::Tensor grad_hidden_MD;
  std::optional<WeightGradient> gate_up, down;
  void* grad_weights = nullptr;

  struct Memory {
    Buffer x, grad_out, grad_inner, activation, grad_gate_up, gate_up_sum, down_sum;
    ExpertWeight gate_up_weight, down_weight;
  };

  void piece(Memory& memory, const Slice& slice, int64_t begin, int64_t end) const {
    const auto inner = layer.inner;
    const int64_t rows = end - begin;
    const bool needs_rows = grad_hidden_MD.defined() || gate_up;
    Matrix grad_inner, activation, grad_gate_up;
    const Matrix grad_out = layer.gather(grad_out_TD, order + begin, rows, memory.grad_out);
    if (needs_rows || grad_weights != nullptr) {
      grad_inner = memory.grad_inner.get(rows, layer.inner_width, inner);
      multiply(grad_inner, grad_out, memory.down_weight.of(layer.down_EDF, slice.expert, inner));
    }
    if (down) {
      activation = memory.activation.get(rows, layer.inner_width, inner);
    }
    if (needs_rows) {
      grad_gate_up = memory.grad_gate_up.get(rows, 2 * layer.inner_width, inner);
    }
    R1FAST_PICK(moe_swiglu_gradient)
    ({inner, rows_of(gate_up_M2F).slice(begin, end), grad_inner, activation, grad_gate_up,
      layer.weights_TK.const_data_ptr(), grad_weights, order + begin},
     0, rows);
    if (down) {
      down->add(slice, begin, end, grad_out, activation, memory.down_sum);
    }
    if (gate_up) {
      const Matrix x = layer.gather(layer.hidden_TD, order + begin, rows, memory.x);
      gate_up->add(slice, begin, end, grad_gate_up, x, memory.gate_up_sum);
    }
    if (grad_hidden_MD.defined()) {
      multiply(rows_of(grad_hidden_MD).slice(begin, end), grad_gate_up,
               memory.gate_up_weight.of(layer.gate_up_E2FD, slice.expert, inner));
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_experts_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden, const at::Tensor& gate_up, const at::Tensor& down,
    const at::Tensor& weights, const at::Tensor& order_M, const at::Tensor& slot_TK, const at::Tensor& offsets_E,
    const at::Tensor& gate_up_M2F, bool needs_hidden, bool needs_gate_up, bool needs_down, bool needs_weights) {
  const Layer layer(hidden, gate_up, down, weights);
  check_tensor("moe_experts_backward", "grad_out", grad_out, layer.storage, hidden.sizes());
  check_tensor("moe_experts_backward", "order_M", order_M, at::kInt, {weights.numel()});
  check_tensor("moe_experts_backward", "slot_TK", slot_TK, at::kInt, weights.sizes());
  check_tensor("moe_experts_backward", "offsets_E", offsets_E, at::kInt, {gate_up.size(0)});
  check_tensor(
      "moe_experts_backward", "gate_up_M2F", gate_up_M2F, layer.storage, {weights.numel(), 2 * layer.inner_width});
  const at::Tensor order = order_M.contiguous(), slot = slot_TK.contiguous(), offsets = offsets_E.contiguous();
  const Slices slices("moe_experts_backward", offsets, order.numel(), layer.inner);
  const auto options = layer.hidden_TD.options();
  at::Tensor grad_gate_up = at::empty(needs_gate_up ? gate_up.sizes() : at::IntArrayRef{0}, options);
  at::Tensor grad_down = at::empty(needs_down ? down.sizes() : at::IntArrayRef{0}, options);
  // 0 where a choice is skipped
  at::Tensor grad_weights = at::zeros(needs_weights ? weights.sizes() : at::IntArrayRef{0}, layer.weights_TK.options());
  Backward pass{layer, grad_out.contiguous(), gate_up_M2F.contiguous(), order.const_data_ptr<int32_t>()};
  if (needs_hidden) {
    pass.grad_hidden_MD = at::empty({slices.num_rows, layer.width}, options.dtype(layer.inner));
  }
  if (needs_gate_up) {
    pass.gate_up.emplace(grad_gate_up, slices, layer.inner);
  }
  if (needs_down) {
    pass.down.emplace(grad_down, slices, layer.inner);
  }
  if (needs_weights) {
    pass.grad_weights = grad_weights.mutable_data_ptr();
  }
  for_pieces<Backward::Memory>(slices, [&](Backward::Memory& memory, const Slice& slice, int64_t begin, int64_t end) {
    pass.piece(memory, slice, begin, end);
  });
  for (const auto& gradient : {pass.gate_up, pass.down}) {
    if (gradient) {
      gradient->add_parts(slices);
    }
  }
  const at::Tensor grad_hidden = needs_hidden ? layer.gather_sum(pass.grad_hidden_MD, slot) : at::empty({0}, options);
  return {grad_hidden, grad_gate_up, grad_down, grad_weights.to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("moe_experts", &moe_experts);
  m.impl("moe_experts_backward", &moe_experts_backward);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
