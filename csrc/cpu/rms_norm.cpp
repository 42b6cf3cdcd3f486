// RMS norm over the last dimension, forward and backward in one pass over the rows each.
//
// A row is read by one thread in a fixed order; the weight's gradient is summed over fixed chunks of rows, and the chunks
// in order: the same bits for any number of threads.
#include "../operator.h"

#include <cmath>
#include <functional>

namespace r1fast {

struct NormArgs {
  at::ScalarType dtype;
  const void* x;       // [T, D], row stride `row_stride`
  const void* weight;  // [D]
  void* out;           // [T, D]
  void* rstd;          // [T], 1 / root mean square
  int64_t row_stride, width;
  double eps;
};

struct NormGradientArgs {
  at::ScalarType dtype;
  const void *grad, *x, *weight, *rstd;  // [T, D], [T, D], [D], [T]
  void* grad_x;    // [T, D], or null
  void* partials;  // [chunks, D] of what is computed in, or null
  int64_t num_rows, row_stride, width;
};

constexpr int64_t kRowsOfChunk = 64;

namespace {

template <typename T>
void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(args.x) + t * args.row_stride;
    T* out = static_cast<T*>(args.out) + t * args.width;
    Vec<acc> sum_a(0), sum_b(0);
    for_parts<acc>(args.width, [&](int64_t i, int64_t size) {
      const auto [a, b] = load_part(x + i, size);
      sum_a = fmadd(a, a, sum_a);
      sum_b = fmadd(b, b, sum_b);
    });
    const acc rstd = 1 / std::sqrt(reduce_sum<acc>(sum_a + sum_b) / args.width + static_cast<acc>(args.eps));
    static_cast<acc*>(args.rstd)[t] = rstd;
    const Vec<acc> scale(rstd);
    for_parts<acc>(args.width, [&](int64_t i, int64_t size) {
      const auto [a, b] = load_part(x + i, size);
      const auto [wa, wb] = load_part(weight + i, size);
      store_part(out + i, size, a * scale * wa, b * scale * wb);
    });
  }
}

// Chunks begin..end of rows. dx = rstd (g - n mean(g n)) with g = grad weight, n = x rstd; dweight = sum grad n.
template <typename T>
void gradient_chunks(const NormGradientArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    acc* partial = args.partials == nullptr ? nullptr : static_cast<acc*>(args.partials) + chunk * args.width;
    if (partial != nullptr) {
      std::fill(partial, partial + args.width, acc(0));
    }
    for (int64_t t = chunk * kRowsOfChunk; t < std::min((chunk + 1) * kRowsOfChunk, args.num_rows); ++t) {
      const T* grad = static_cast<const T*>(args.grad) + t * args.width;
      const T* x = static_cast<const T*>(args.x) + t * args.row_stride;
      const acc rstd = static_cast<const acc*>(args.rstd)[t];
      const Vec<acc> scale(rstd);
      Vec<acc> dot_a(0), dot_b(0);
      for_parts<acc>(args.width, [&](int64_t i, int64_t size) {
        const auto [ga, gb] = load_part(grad + i, size);
        const auto [xa, xb] = load_part(x + i, size);
        const auto [wa, wb] = load_part(weight + i, size);
        const Vec<acc> pa = ga * (xa * scale), pb = gb * (xb * scale);
        dot_a = fmadd(pa, wa, dot_a);
        dot_b = fmadd(pb, wb, dot_b);
        if (partial != nullptr) {
          const auto [sa, sb] = load_part(static_cast<const acc*>(partial + i), size);
          store_part(partial + i, size, sa + pa, sb + pb);
        }
      });
      if (args.grad_x == nullptr) {
        continue;
      }
      const Vec<acc> mean(reduce_sum<acc>(dot_a + dot_b) / args.width);
      T* out = static_cast<T*>(args.grad_x) + t * args.width;
      for_parts<acc>(args.width, [&](int64_t i, int64_t size) {
        const auto [ga, gb] = load_part(grad + i, size);
        const auto [xa, xb] = load_part(x + i, size);
        const auto [wa, wb] = load_part(weight + i, size);
        store_part(
            out + i, size, scale * (ga * wa - xa * scale * mean), scale * (gb * wb - xb * scale * mean));
      });
    }
  }
}

}  // namespace

R1FAST_KERNEL(rms_norm_rows, NormArgs) {
  by_dtype(args.dtype, [&]<typename T>() { norm_rows<T>(args, begin, end); });
}

R1FAST_KERNEL(rms_norm_gradient, NormGradientArgs) {
  by_dtype(args.dtype, [&]<typename T>() { gradient_chunks<T>(args, begin, end); });
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x_TD, const at::Tensor& weight_D, double eps) {
  check_floats("rms_norm", {x_TD, weight_D});
  check_tensor("rms_norm", "x_TD", x_TD, x_TD.scalar_type(), {-1, weight_D.numel()});
  const at::Tensor x = with_unit_columns(x_TD), weight = weight_D.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  at::Tensor rstd = at::empty({x.size(0)}, x.options().dtype(computed_in(x.scalar_type())));
  const NormArgs args{
      x.scalar_type(), x.const_data_ptr(), weight.const_data_ptr(), out.mutable_data_ptr(), rstd.mutable_data_ptr(),
      x.stride(0), x.size(1), eps};
  run_rows(R1FAST_PICK(rms_norm_rows), args, x.size(0), x.size(1));
  return {out, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& grad_TD, const at::Tensor& x_TD, const at::Tensor& weight_D, const at::Tensor& rstd_T,
    bool needs_x, bool needs_weight) {
  const at::Tensor grad = grad_TD.contiguous(), x = with_unit_columns(x_TD), weight = weight_D.contiguous();
  const at::Tensor rstd = rstd_T.contiguous();
  const int64_t num_chunks = (x.size(0) + kRowsOfChunk - 1) / kRowsOfChunk;
  at::Tensor grad_x = at::empty(needs_x ? x.sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor partials =
      at::empty({needs_weight ? num_chunks : 0, x.size(1)}, x.options().dtype(computed_in(x.scalar_type())));
  const NormGradientArgs args{
      x.scalar_type(), grad.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(), rstd.const_data_ptr(),
      needs_x ? grad_x.mutable_data_ptr() : nullptr, needs_weight ? partials.mutable_data_ptr() : nullptr, x.size(0),
      x.stride(0), x.size(1)};
  run_rows(R1FAST_PICK(rms_norm_gradient), args, num_chunks, x.size(1) * kRowsOfChunk);
  const at::Tensor parts = partials.to(at::kDouble);
  const at::Tensor sums_D = at::zeros({needs_weight ? x.size(1) : 0}, parts.options());
  double* sums = sums_D.mutable_data_ptr<double>();
  const double* part = parts.const_data_ptr<double>();
  for (int64_t chunk = 0; chunk < parts.size(0); ++chunk, part += x.size(1)) {
    std::transform(part, part + x.size(1), sums, sums, std::plus<>());
  }
  return {grad_x, sums_D.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
