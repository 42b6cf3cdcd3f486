// What operators share (the plain build alone): the choice of a kernel, checks, tasks, and what of torch is not public.
#pragma once

#include "simd.h"

#ifdef R1FAST_BUILD_OPERATOR

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef R1FAST_BUILD_X86
#define R1FAST_PICK(name)                                                                                \
  (::r1fast::cpu_capability() == "AVX512" ? name##_AVX512 : ::r1fast::cpu_capability() == "AVX2" ? name##_AVX2 \
                                                                                                 : name##_DEFAULT)
#else
#define R1FAST_PICK(name) name##_DEFAULT
#endif

namespace r1fast {

inline const std::string& cpu_capability() {
  static const std::string found = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
  return found;
}

using OptionalTensor = std::optional<at::Tensor>;

// What a dtype is computed in.
inline at::ScalarType computed_in(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// All of one dtype, one that the kernels take.
inline void check_floats(const char* op, at::TensorList tensors) {
  const auto dtype = tensors[0].scalar_type();
  for (const at::Tensor& x : tensors) {
    TORCH_CHECK_VALUE(
        x.scalar_type() == dtype && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble), op,
        ": got ", x.scalar_type(), " beside ", dtype, ", expected one of float32, bfloat16 and float64 for all");
  }
}

// -1: of any size.
inline void check_tensor(
    const char* op, const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  bool fits = x.scalar_type() == dtype && x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes[i] < 0 || x.size(static_cast<int64_t>(i)) == sizes[i];
  }
  TORCH_CHECK_VALUE(
      fits, op, ": got ", name, " ", x.sizes(), " in ", x.scalar_type(), ", expected ", sizes, " (-1: any size) in ",
      dtype);
}

// The last dimension without gaps.
inline at::Tensor with_unit_columns(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// Rows 0..count of a kernel, each of about so many elements. A task has 32k: 10-20 us, enough to wake a thread for.
template <typename Args>
void run_rows(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t count, int64_t elements) {
  const int64_t per_task = std::max<int64_t>(1, 32768 / std::max<int64_t>(elements, 1));
  at::parallel_for(0, count, per_task, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// ---- not public in torch: built and tested with 2.13; at::cpu functions and this schema are older than 2.11 ----

// out = a b, or out += a b: the CPU's own functions, because a thread of at::parallel_for is outside of no_grad.
inline void mm_into(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (add) {
    at::cpu::addmm_out(out, out, a, b, 1, 1);
  } else {
    at::cpu::mm_out(out, a, b);
  }
}

// What torch itself asks before it gives a bf16 product to oneDNN; its other products of bf16 take 5 to 70 times as
// long as those of fp32.
inline bool torch_multiplies_bf16() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("mkldnn::_is_mkldnn_bf16_supported", "")
      .typed<bool()>()
      .call();
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
