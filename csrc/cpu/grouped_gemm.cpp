// One product per expert, and what its slices, widened weights and sums are (moe.h); the products are the vendor's.
#ifdef R1FAST_BUILD_OPERATOR

#include "../moe.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <cstring>

namespace r1fast {
namespace {

// Rows that go through all steps of a layer together. Fewer stay nearer to the core, but cost the products more than
// that gains: of 128, 256, 512 and 1024 rows this was the fastest at D = 256, F = 128.
constexpr int64_t kPiece = 512;
// Rows of a slice: so many, or a sixteenth of all. Each slice of an expert that is cut has its own sum of the weight's
// gradient, so their number is bounded, and experts with a fair share of the tokens are not cut where E >= 16.
constexpr int64_t kSlice = 1024;
constexpr int64_t kMostSlices = 16;

std::atomic<int> widens_bf16{-1};  // not looked up yet

at::Tensor matrix(const void* data, int64_t rows, int64_t columns, bool transposed, at::ScalarType dtype) {
  void* memory = const_cast<void*>(data);  // factors are only read
  const auto options = at::TensorOptions().dtype(dtype);
  return transposed ? at::from_blob(memory, {columns, rows}, {1, std::max<int64_t>(columns, 1)}, options)
                    : at::from_blob(memory, {rows, columns}, options);
}

int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace

at::ScalarType inner_dtype(at::ScalarType storage) {
  if (storage != at::kBFloat16) {
    return storage;
  }
  if (widens_bf16 < 0) {
    // What torch itself asks before it gives a bf16 product to oneDNN; its other products of bf16 take 5 to 70 times
    // as long as those of fp32.
    const bool has_products = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("mkldnn::_is_mkldnn_bf16_supported", "")
                                  .typed<bool()>()
                                  .call();
    widens_bf16 = has_products ? 0 : 1;
  }
  return widens_bf16 != 0 ? at::kFloat : storage;
}

Slices::Slices(const char* op, const at::Tensor& offsets_E, int64_t all_rows, at::ScalarType inner) {
  TORCH_CHECK_VALUE(
      offsets_E.dim() == 1 && offsets_E.scalar_type() == at::kInt && offsets_E.is_contiguous(), op,
      ": got offsets of shape ", offsets_E.sizes(), " and dtype ", offsets_E.scalar_type(),
      ", expected contiguous int32 [E]");
  const int64_t most = std::max(kSlice, round_up(all_rows / kMostSlices, kPiece));
  // Where sums are kept in bf16 nothing may be added to them twice: a slice is one piece.
  piece = inner == at::kBFloat16 ? most : kPiece;
  const int32_t* ends = offsets_E.const_data_ptr<int32_t>();
  for (int64_t expert = 0; expert < offsets_E.size(0); ++expert) {
    const int64_t end = ends[expert];
    TORCH_CHECK_VALUE(
        end >= num_rows && end <= all_rows, op, ": got offsets_E[", expert, "] = ", end, " after ", num_rows,
        ", expected ends that do not decrease and are at most ", all_rows, " rows");
    const bool cut = end - num_rows > most;
    int64_t begin = num_rows;
    do {
      const int64_t stop = std::min(begin + most, end);
      all.push_back({expert, begin, stop, cut ? num_parts++ : -1});
      longest = std::max(longest, stop - begin);
      begin = stop;
    } while (begin < end);
    num_rows = end;
  }
  piece = std::min(piece, longest);
}

void multiply(void* out, const Matrix& a, const Matrix& b, at::ScalarType dtype, bool add) {
  const at::Tensor left = matrix(a.data, a.rows, a.columns, a.transposed, dtype);
  const at::Tensor right = matrix(b.data, b.rows, b.columns, b.transposed, dtype);
  at::Tensor product = matrix(out, left.size(0), right.size(1), false, dtype);
  if (add) {
    at::cpu::addmm_out(product, product, left, right, 1, 1);
  } else {
    at::cpu::mm_out(product, left, right);
  }
}

void* Buffer::get(int64_t numel, at::ScalarType dtype) {
  const int64_t size = static_cast<int64_t>(bytes(numel, dtype));
  if (!memory_.defined() || memory_.numel() < size) {
    memory_ = at::empty({size}, at::TensorOptions().dtype(at::kByte));
  }
  return memory_.mutable_data_ptr();
}

const void* ExpertWeight::of(int64_t expert) {
  const int64_t rows = weight_.size(1), columns = weight_.size(2);
  const void* weight = offset(weight_.const_data_ptr(), expert * rows * columns, weight_.scalar_type());
  if (weight_.scalar_type() == inner_) {
    return weight;
  }
  void* copy = copy_.get(rows * columns, inner_);
  if (expert != expert_) {
    R1FAST_PICK(moe_gather)({weight_.scalar_type(), inner_, weight, nullptr, 1, columns, copy}, 0, rows);
    expert_ = expert;
  }
  return copy;
}

WeightGradient::WeightGradient(const at::Tensor& out, const Slices& slices, at::ScalarType inner)
    : out_(out), inner_(inner), numel_(out.size(1) * out.size(2)) {
  if (slices.num_parts > 0) {
    parts_ = at::empty({slices.num_parts, numel_}, out.options().dtype(inner));
  }
}

void* WeightGradient::begin(const Slice& slice, Buffer& buffer) const {
  if (slice.part >= 0) {
    return offset(parts_.mutable_data_ptr(), slice.part * numel_, inner_);
  }
  void* out = offset(out_.mutable_data_ptr(), slice.expert * numel_, out_.scalar_type());
  if (slice.begin == slice.end) {
    std::memset(out, 0, bytes(numel_, out_.scalar_type()));
    return out;
  }
  return out_.scalar_type() == inner_ ? out : buffer.get(numel_, inner_);
}

void WeightGradient::end(const Slice& slice, const void* sum) const {
  if (slice.part < 0 && slice.begin < slice.end && out_.scalar_type() != inner_) {
    void* out = offset(out_.mutable_data_ptr(), slice.expert * numel_, out_.scalar_type());
    R1FAST_PICK(moe_sum)({out_.scalar_type(), inner_, sum, 1, 0, out}, 0, numel_);
  }
}

void WeightGradient::add_parts(const Slices& slices) const {
  for (size_t i = 0; i < slices.all.size();) {
    const Slice& first = slices.all[i];
    size_t next = i + 1;
    while (next < slices.all.size() && slices.all[next].expert == first.expert) {
      ++next;
    }
    if (first.part >= 0) {
      const SumArgs args{
          out_.scalar_type(), inner_, offset(parts_.const_data_ptr(), first.part * numel_, inner_),
          static_cast<int64_t>(next - i), numel_,
          offset(out_.mutable_data_ptr(), first.expert * numel_, out_.scalar_type())};
      at::parallel_for(0, numel_, rows_per_task(1), [&](int64_t begin, int64_t end) {
        R1FAST_PICK(moe_sum)(args, begin, end);
      });
    }
    i = next;
  }
}

namespace {

void check_dtype(const char* op, const at::Tensor& x, const at::Tensor& other) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble) && other.scalar_type() == dtype, op,
      ": got ", dtype, " and ", other.scalar_type(), ", expected both float32, bfloat16 or float64");
}

at::Tensor grouped_gemm(
    const at::Tensor& x_MD, const at::Tensor& weight, const at::Tensor& offsets_E, bool transpose_weight) {
  check_dtype("grouped_gemm", x_MD, weight);
  TORCH_CHECK_VALUE(
      x_MD.dim() == 2 && weight.dim() == 3 && weight.size(transpose_weight ? 2 : 1) == x_MD.size(1) &&
          offsets_E.numel() == weight.size(0),
      "grouped_gemm: got x ", x_MD.sizes(), ", weight ", weight.sizes(), " and offsets ", offsets_E.sizes(),
      ", expected [M, D], ", transpose_weight ? "[E, N, D]" : "[E, D, N]", " and [E]");
  const at::Tensor x = x_MD.contiguous(), weights = weight.contiguous(), offsets = offsets_E.contiguous();
  const auto storage = x.scalar_type(), inner = inner_dtype(storage);
  const int64_t num_rows = x.size(0), depth = x.size(1), width = weight.size(transpose_weight ? 1 : 2);
  at::Tensor out = at::empty({num_rows, width}, x.options());
  const Slices slices("grouped_gemm", offsets, num_rows, inner);
  for_slices(slices, [&](const auto& next) {
    Buffer x_buffer, out_buffer;
    ExpertWeight expert_weight(weights, inner);
    while (const Slice* slice = next()) {
      for (int64_t begin = slice->begin; begin < slice->end; begin += slices.piece) {
        const int64_t rows = std::min(slices.piece, slice->end - begin);
        const void* from = offset(x.const_data_ptr(), begin * depth, storage);
        void* to = offset(out.mutable_data_ptr(), begin * width, storage);
        void* product = to;
        if (storage != inner) {
          void* widened = x_buffer.get(rows * depth, inner);
          R1FAST_PICK(moe_gather)({storage, inner, from, nullptr, 1, depth, widened}, 0, rows);
          from = widened;
          product = out_buffer.get(rows * width, inner);
        }
        const int64_t first = transpose_weight ? width : depth, second = transpose_weight ? depth : width;
        multiply(
            product, {from, rows, depth}, {expert_weight.of(slice->expert), first, second, transpose_weight}, inner);
        if (storage != inner) {
          R1FAST_PICK(moe_sum)({storage, inner, product, 1, 0, to}, 0, rows * width);
        }
      }
    }
  });
  const int64_t skipped = num_rows - slices.num_rows;
  std::memset(offset(out.mutable_data_ptr(), slices.num_rows * width, storage), 0, bytes(skipped * width, storage));
  return out;
}

at::Tensor grouped_gemm_weight(const at::Tensor& x_MD, const at::Tensor& y_MN, const at::Tensor& offsets_E) {
  check_dtype("grouped_gemm_weight", x_MD, y_MN);
  TORCH_CHECK_VALUE(
      x_MD.dim() == 2 && y_MN.dim() == 2 && x_MD.size(0) == y_MN.size(0), "grouped_gemm_weight: got x ", x_MD.sizes(),
      " and y ", y_MN.sizes(), ", expected [M, D] and [M, N]");
  const at::Tensor x = x_MD.contiguous(), y = y_MN.contiguous(), offsets = offsets_E.contiguous();
  const auto storage = x.scalar_type(), inner = inner_dtype(storage);
  const int64_t depth = x.size(1), width = y.size(1);
  const Slices slices("grouped_gemm_weight", offsets, x.size(0), inner);
  at::Tensor out = at::empty({offsets.size(0), width, depth}, x.options());
  const WeightGradient gradient(out, slices, inner);
  for_slices(slices, [&](const auto& next) {
    Buffer x_buffer, y_buffer, sum_buffer;
    while (const Slice* slice = next()) {
      void* sum = gradient.begin(*slice, sum_buffer);
      for (int64_t begin = slice->begin; begin < slice->end; begin += slices.piece) {
        const int64_t rows = std::min(slices.piece, slice->end - begin);
        const void* x_rows = offset(x.const_data_ptr(), begin * depth, storage);
        const void* y_rows = offset(y.const_data_ptr(), begin * width, storage);
        if (storage != inner) {
          void* x_widened = x_buffer.get(rows * depth, inner);
          void* y_widened = y_buffer.get(rows * width, inner);
          R1FAST_PICK(moe_gather)({storage, inner, x_rows, nullptr, 1, depth, x_widened}, 0, rows);
          R1FAST_PICK(moe_gather)({storage, inner, y_rows, nullptr, 1, width, y_widened}, 0, rows);
          x_rows = x_widened;
          y_rows = y_widened;
        }
        multiply(sum, {y_rows, rows, width, true}, {x_rows, rows, depth}, inner, begin > slice->begin);
      }
      gradient.end(*slice, sum);
    }
  });
  gradient.add_parts(slices);
  return out;
}

bool set_widens_bf16(bool widens) {
  const bool before = inner_dtype(at::kBFloat16) == at::kFloat;
  widens_bf16 = widens ? 1 : 0;
  return before;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("grouped_gemm", &grouped_gemm);
  m.impl("grouped_gemm_weight", &grouped_gemm_weight);
}

// For tests of both: whether bf16 is widened. Returns what was before.
TORCH_LIBRARY_FRAGMENT(r1fast, m) {
  m.def("_set_widens_bf16(bool widens) -> bool", &set_widens_bf16);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
