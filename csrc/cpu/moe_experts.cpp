// The routed experts, forward and backward, slice by slice (moe.h): each thread takes rows of one expert through all
// steps, from the gathered inputs to the rows that the tokens will sum, in buffers of its own that stay in the cache.
//
//   forward    x = hidden[token]    [g u] = x gate_up^T    a = silu(g) u w    y = a down^T       out = sum of y
//   backward   dy = grad_out[token]    da = dy down    d_w = <da, h>    [dg du]    dx = [dg du] gate_up    and sums
#ifdef R1FAST_BUILD_OPERATOR

#include "../moe.h"

#include <ATen/ops/zeros.h>

#include <cstring>

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

  // x [rows, D] -> [rows, 2F]
  void gate_up_product(void* out, const void* x, const void* gate_up, int64_t rows) const {
    multiply(out, {x, rows, width}, {gate_up, 2 * inner_width, width, true}, inner);
  }

  GatherArgs gather(const at::Tensor& rows_TD, const int32_t* order, void* out) const {
    return {storage, inner, rows_TD.const_data_ptr(), order, top_k, width, out};
  }

  at::Tensor gather_sum(const at::Tensor& rows_MD, const at::Tensor& slot_TK, int64_t num_rows) const {
    at::Tensor out_TD = at::empty({num_tokens, width}, hidden_TD.options());
    const GatherSumArgs args{
        storage, inner, rows_MD.const_data_ptr(), slot_TK.const_data_ptr<int32_t>(), top_k, num_rows, width,
        out_TD.mutable_data_ptr()};
    run_rows(R1FAST_PICK(moe_gather_sum), args, num_tokens, width * top_k);
    return out_TD;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_experts(
    const at::Tensor& hidden, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& expert_ids_TK,
    const at::Tensor& weights, bool keep) {
  const Layer layer(hidden, gate_up, down, weights);
  check_tensor("moe_experts", "expert_ids_TK", expert_ids_TK, at::kLong, weights.sizes());
  const Dispatch dispatch = dispatch_by_expert(expert_ids_TK, gate_up.size(0));
  const auto storage = layer.storage, inner = layer.inner;
  const int64_t num_choices = expert_ids_TK.numel(), width = layer.width, inner_width = layer.inner_width;
  const Slices slices("moe_experts", dispatch.offsets_E, num_choices, inner);
  at::Tensor gate_up_M2F = at::empty({0}, layer.hidden_TD.options());
  if (keep) {
    gate_up_M2F = at::empty({num_choices, 2 * inner_width}, layer.hidden_TD.options());
    const int64_t skipped = num_choices - slices.num_rows;
    std::memset(mutable_row(gate_up_M2F, slices.num_rows), 0, skipped * 2 * inner_width * gate_up_M2F.element_size());
  }
  const at::Tensor out_MD = at::empty({slices.num_rows, width}, layer.hidden_TD.options().dtype(inner));
  const int32_t* order = dispatch.order_M.const_data_ptr<int32_t>();
  for_slices(slices, [&](const auto& next) {
    Buffer x_buffer, gate_up_buffer, activation_buffer;
    ExpertWeight gate_up_weight(layer.gate_up_E2FD, inner), down_weight(layer.down_EDF, inner);
    while (const Slice* slice = next()) {
      for (int64_t begin = slice->begin; begin < slice->end; begin += slices.piece) {
        const int64_t end = std::min(begin + slices.piece, slice->end), rows = end - begin;
        void* x = x_buffer.get(slices.piece * width, inner);
        void* activation = activation_buffer.get(slices.piece * inner_width, inner);
        void* kept = keep ? mutable_row(gate_up_M2F, begin) : nullptr;
        const bool in_place = keep && storage == inner;
        void* gate_up_rows = in_place ? kept : gate_up_buffer.get(slices.piece * 2 * inner_width, inner);
        R1FAST_PICK(moe_gather)(layer.gather(layer.hidden_TD, order, x), begin, end);
        layer.gate_up_product(gate_up_rows, x, gate_up_weight.of(slice->expert), rows);
        R1FAST_PICK(moe_swiglu)
        ({storage, inner, gate_up_rows, in_place ? nullptr : kept, layer.weights_TK.const_data_ptr(), order,
          inner_width, activation},
         begin, end);
        multiply(
            mutable_row(out_MD, begin), {activation, rows, inner_width},
            {down_weight.of(slice->expert), width, inner_width, true}, inner);
      }
    }
  });
  const at::Tensor out_TD = layer.gather_sum(out_MD, dispatch.slot_TK, slices.num_rows);
  return {out_TD, dispatch.order_M, dispatch.slot_TK, dispatch.offsets_E, gate_up_M2F};
}

// What a backward pass writes; null or undefined where it is not needed.
struct Gradients {
  at::Tensor hidden_MD;
  std::optional<WeightGradient> gate_up, down;
  void* weights = nullptr;
};

// The buffers of one thread, and its way through a slice.
class BackwardWorker {
 public:
  BackwardWorker(
      const Layer& layer, const Slices& slices, const at::Tensor& grad_out_TD, const at::Tensor& gate_up_M2F,
      const int32_t* order, const Gradients& gradients)
      : layer_(layer), slices_(slices), grad_out_TD_(grad_out_TD), gate_up_M2F_(gate_up_M2F), order_(order),
        gradients_(gradients), gate_up_weight_(layer.gate_up_E2FD, layer.inner),
        down_weight_(layer.down_EDF, layer.inner) {}

  void run(const Slice& slice) {
    void* gate_up_sum = gradients_.gate_up ? gradients_.gate_up->begin(slice, gate_up_sum_) : nullptr;
    void* down_sum = gradients_.down ? gradients_.down->begin(slice, down_sum_) : nullptr;
    for (int64_t begin = slice.begin; begin < slice.end; begin += slices_.piece) {
      const int64_t end = std::min(begin + slices_.piece, slice.end);
      run_piece(slice, begin, end, gate_up_sum, down_sum);
    }
    if (gradients_.gate_up) {
      gradients_.gate_up->end(slice, gate_up_sum);
    }
    if (gradients_.down) {
      gradients_.down->end(slice, down_sum);
    }
  }

 private:
  void* rows_of(Buffer& buffer, int64_t width) { return buffer.get(slices_.piece * width, layer_.inner); }

  void run_piece(const Slice& slice, int64_t begin, int64_t end, void* gate_up_sum, void* down_sum) {
    const auto storage = layer_.storage, inner = layer_.inner;
    const int64_t rows = end - begin, width = layer_.width, inner_width = layer_.inner_width;
    const bool is_kept = gate_up_M2F_.numel() > 0;
    const bool needs_gate_up_rows = gradients_.hidden_MD.defined() || gate_up_sum != nullptr;
    const void* x = nullptr;
    if (gate_up_sum != nullptr || !is_kept) {
      void* gathered = rows_of(x_, width);
      R1FAST_PICK(moe_gather)(layer_.gather(layer_.hidden_TD, order_, gathered), begin, end);
      x = gathered;
    }
    const void* gate_up = is_kept ? const_row(gate_up_M2F_, begin) : recompute(slice.expert, x, rows);
    void* grad_out = nullptr;
    if (needs_gate_up_rows || down_sum != nullptr || gradients_.weights != nullptr) {
      grad_out = rows_of(grad_out_, width);
      R1FAST_PICK(moe_gather)(layer_.gather(grad_out_TD_, order_, grad_out), begin, end);
    }
    void* grad_inner = nullptr;
    if (needs_gate_up_rows || gradients_.weights != nullptr) {
      grad_inner = rows_of(grad_inner_, inner_width);
      multiply(grad_inner, {grad_out, rows, width}, {down_weight_.of(slice.expert), width, inner_width}, inner);
    }
    void* activation = down_sum != nullptr ? rows_of(activation_, inner_width) : nullptr;
    void* grad_gate_up = needs_gate_up_rows ? rows_of(grad_gate_up_, 2 * inner_width) : nullptr;
    R1FAST_PICK(moe_swiglu_gradient)
    ({storage, inner, gate_up, grad_inner, layer_.weights_TK.const_data_ptr(), order_, inner_width, activation,
      grad_gate_up, gradients_.weights},
     begin, end);
    const bool add = begin > slice.begin;
    if (down_sum != nullptr) {
      multiply(down_sum, {grad_out, rows, width, true}, {activation, rows, inner_width}, inner, add);
    }
    if (gate_up_sum != nullptr) {
      multiply(gate_up_sum, {grad_gate_up, rows, 2 * inner_width, true}, {x, rows, width}, inner, add);
    }
    if (gradients_.hidden_MD.defined()) {
      multiply(
          mutable_row(gradients_.hidden_MD, begin), {grad_gate_up, rows, 2 * inner_width},
          {gate_up_weight_.of(slice.expert), 2 * inner_width, width}, inner);
    }
  }

  // As the forward pass would have kept it: the same product, rounded to the same dtype.
  const void* recompute(int64_t expert, const void* x, int64_t rows) {
    void* product = rows_of(gate_up_, 2 * layer_.inner_width);
    layer_.gate_up_product(product, x, gate_up_weight_.of(expert), rows);
    if (layer_.storage == layer_.inner) {
      return product;
    }
    void* rounded = rounded_.get(slices_.piece * 2 * layer_.inner_width, layer_.storage);
    R1FAST_PICK(moe_sum)
    ({layer_.storage, layer_.inner, product, 1, 0, rounded}, 0, rows * 2 * layer_.inner_width);
    return rounded;
  }

  const Layer& layer_;
  const Slices& slices_;
  const at::Tensor &grad_out_TD_, &gate_up_M2F_;
  const int32_t* order_;
  const Gradients& gradients_;
  ExpertWeight gate_up_weight_, down_weight_;
  Buffer x_, gate_up_, rounded_, grad_out_, grad_inner_, activation_, grad_gate_up_, gate_up_sum_, down_sum_;
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
  const at::Tensor grad_out_TD = grad_out.contiguous(), kept = gate_up_M2F.contiguous();
  const at::Tensor order = order_M.contiguous(), slot = slot_TK.contiguous(), offsets = offsets_E.contiguous();
  const Slices slices("moe_experts_backward", offsets, order.numel(), layer.inner);
  const auto options = layer.hidden_TD.options();
  at::Tensor grad_hidden = at::empty({0}, options);
  at::Tensor grad_gate_up = at::empty(needs_gate_up ? gate_up.sizes() : at::IntArrayRef{0}, options);
  at::Tensor grad_down = at::empty(needs_down ? down.sizes() : at::IntArrayRef{0}, options);
  // 0 where a choice is skipped
  at::Tensor grad_weights = at::zeros(needs_weights ? weights.sizes() : at::IntArrayRef{0}, layer.weights_TK.options());
  Gradients gradients;
  if (needs_hidden) {
    gradients.hidden_MD = at::empty({slices.num_rows, layer.width}, options.dtype(layer.inner));
  }
  if (needs_gate_up) {
    gradients.gate_up.emplace(grad_gate_up, slices, layer.inner);
  }
  if (needs_down) {
    gradients.down.emplace(grad_down, slices, layer.inner);
  }
  if (needs_weights) {
    gradients.weights = grad_weights.mutable_data_ptr();
  }
  for_slices(slices, [&](const auto& next) {
    BackwardWorker worker(layer, slices, grad_out_TD, kept, order.const_data_ptr<int32_t>(), gradients);
    while (const Slice* slice = next()) {
      worker.run(*slice);
    }
  });
  for (const auto& gradient : {gradients.gate_up, gradients.down}) {
    if (gradient) {
      gradient->add_parts(slices);
    }
  }
  if (needs_hidden) {
    grad_hidden = layer.gather_sum(gradients.hidden_MD, slot, slices.num_rows);
  }
  return {grad_hidden, grad_gate_up, grad_down, grad_weights.to(weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("moe_experts", &moe_experts);
  m.impl("moe_experts_backward", &moe_experts_backward);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
