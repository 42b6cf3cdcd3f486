// silu(gate) * up and its gradients: each tensor is read or written once, and nothing between is rounded.
#include "../operator.h"

namespace r1fast {

struct SwigluPassArgs {
  at::ScalarType dtype;
  const void *gate, *up;
  const void* grad;  // null: forward
  void *out, *grad_gate, *grad_up;
};

namespace {
inline namespace CPU_CAPABILITY {

template <typename T>
void swiglu_elements(const SwigluPassArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const T *gate = static_cast<const T*>(args.gate) + begin, *up = static_cast<const T*>(args.up) + begin;
  T* out = static_cast<T*>(args.out) + begin;
  for_parts<acc>(end - begin, [&](int64_t i, int64_t size) {
    const auto [g0, g1] = load_part(gate + i, size);
    const auto [u0, u1] = load_part(up + i, size);
    store_part(out + i, size, g0 * sigmoid<acc>(g0) * u0, g1 * sigmoid<acc>(g1) * u1);
  });
}

// d up = grad silu(gate), d gate = grad up silu'(gate), silu'(g) = s (1 + g (1 - s)).
template <typename T>
void gradient_elements(const SwigluPassArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const T *gate = static_cast<const T*>(args.gate) + begin, *up = static_cast<const T*>(args.up) + begin;
  const T* grad = static_cast<const T*>(args.grad) + begin;
  T *grad_gate = static_cast<T*>(args.grad_gate) + begin, *grad_up = static_cast<T*>(args.grad_up) + begin;
  const Vec<acc> one(1);
  const auto slope = [&](const Vec<acc>& g, const Vec<acc>& s) { return s * fmadd(g, one - s, one); };
  for_parts<acc>(end - begin, [&](int64_t i, int64_t size) {
    const auto [g0, g1] = load_part(gate + i, size);
    const auto [u0, u1] = load_part(up + i, size);
    const auto [d0, d1] = load_part(grad + i, size);
    const Vec<acc> s0 = sigmoid<acc>(g0), s1 = sigmoid<acc>(g1);
    store_part(grad_gate + i, size, d0 * u0 * slope(g0, s0), d1 * u1 * slope(g1, s1));
    store_part(grad_up + i, size, d0 * g0 * s0, d1 * g1 * s1);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace

R1FAST_KERNEL(swiglu_pass, SwigluPassArgs) {
  by_dtype(args.dtype, [&]<typename T>() {
    args.grad == nullptr ? swiglu_elements<T>(args, begin, end) : gradient_elements<T>(args, begin, end);
  });
}

}  // namespace r1fast

#ifdef R1FAST_BUILD_OPERATOR

namespace r1fast {
namespace {

void check(const at::Tensor& gate, const at::Tensor& up) {
  check_floats("swiglu", {gate, up});
  check_tensor("swiglu", "up", up, gate.scalar_type(), gate.sizes());
}

void run(const SwigluPassArgs& args, int64_t numel) {
  run_rows(R1FAST_PICK(swiglu_pass), args, numel, 1);
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  const at::Tensor g = gate.contiguous(), u = up.contiguous();
  at::Tensor out = at::empty(g.sizes(), g.options());
  run({g.scalar_type(), g.const_data_ptr(), u.const_data_ptr(), nullptr, out.mutable_data_ptr(), nullptr, nullptr},
      g.numel());
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(
    const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up) {
  check(gate, up);
  const at::Tensor d = grad.contiguous(), g = gate.contiguous(), u = up.contiguous();
  at::Tensor grad_gate = at::empty(g.sizes(), g.options()), grad_up = at::empty(g.sizes(), g.options());
  if (g.numel() > 0) {
    run({g.scalar_type(), g.const_data_ptr(), u.const_data_ptr(), d.const_data_ptr(), nullptr,
         grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr()},
        g.numel());
  }
  return {grad_gate, grad_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
