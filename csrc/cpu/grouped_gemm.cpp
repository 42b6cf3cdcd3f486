// One product per expert, and what its slices, widened weights and sums are (moe.h); the products are the vendor's.
#ifdef R1FAST_BUILD_OPERATOR

#include "../moe.h"

#include <ATen/ops/from_blob.h>

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
    widens_bf16 = torch_multiplies_bf16() ? 0 : 1;
  }
  return widens_bf16 != 0 ? at::kFloat : storage;
}

Slices::Slices(const char* op, const at::Tensor& offsets_E, int64_t all_rows, at::ScalarType inner) {
  check_tensor(op, "offsets_E", offsets_E, at::kInt, {-1});
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
  mm_into(product, left, right, add);
}

void* Buffer::get(int64_t numel, at::ScalarType dtype) {
  const int64_t size = numel * static_cast<int64_t>(c10::elementSize(dtype));
  if (!memory_.defined() || memory_.numel() < size) {
    memory_ = at::empty({size}, at::TensorOptions().dtype(at::kByte));
  }
  return memory_.mutable_data_ptr();
}

const void* widened(const at::Tensor& x, int64_t begin, int64_t end, at::ScalarType inner, Buffer& buffer) {
  const void* rows = const_row(x, begin);
  if (x.scalar_type() == inner) {
    return rows;
  }
  const int64_t numel = (end - begin) * row_numel(x);
  void* copy = buffer.get(numel, inner);
  R1FAST_PICK(moe_gather)({x.scalar_type(), inner, rows, nullptr, 1, numel, copy}, 0, 1);
  return copy;
}

void round_to(const at::Tensor& x, int64_t row, const void* values, int64_t numel, at::ScalarType inner) {
  R1FAST_PICK(moe_sum)({x.scalar_type(), inner, values, 1, 0, mutable_row(x, row)}, 0, numel);
}

const void* ExpertWeight::of(int64_t expert) {
  if (expert != expert_) {
    found_ = widened(weight_, expert, expert + 1, inner_, copy_);
    expert_ = expert;
  }
  return found_;
}

WeightGradient::WeightGradient(const at::Tensor& out, const Slices& slices, at::ScalarType inner)
    : out_(out), inner_(inner) {
  if (slices.num_parts > 0) {
    parts_ = at::empty({slices.num_parts, out.size(1), out.size(2)}, out.options().dtype(inner));
  }
}

void* WeightGradient::begin(const Slice& slice, Buffer& buffer) const {
  if (slice.part >= 0) {
    return mutable_row(parts_, slice.part);
  }
  void* out = mutable_row(out_, slice.expert);
  if (slice.begin == slice.end) {
    std::memset(out, 0, row_numel(out_) * out_.element_size());
    return out;
  }
  return out_.scalar_type() == inner_ ? out : buffer.get(row_numel(out_), inner_);
}

void WeightGradient::end(const Slice& slice, const void* sum) const {
  if (slice.part < 0 && slice.begin < slice.end && out_.scalar_type() != inner_) {
    round_to(out_, slice.expert, sum, row_numel(out_), inner_);
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
      const int64_t numel = row_numel(out_), count = static_cast<int64_t>(next - i);
      const SumArgs args{out_.scalar_type(), inner_, const_row(parts_, first.part), count, numel,
                         mutable_row(out_, first.expert)};
      run_rows(R1FAST_PICK(moe_sum), args, numel, 1);
    }
    i = next;
  }
}

namespace {

at::Tensor grouped_gemm(
    const at::Tensor& x_MD, const at::Tensor& weight, const at::Tensor& offsets_E, bool transpose_weight) {
  check_floats("grouped_gemm", {x_MD, weight});
  const at::Tensor x = x_MD.contiguous(), weights = weight.contiguous(), offsets = offsets_E.contiguous();
  const auto storage = x.scalar_type(), inner = inner_dtype(storage);
  const int64_t num_rows = x.size(0), depth = x.size(1), width = weight.size(transpose_weight ? 1 : 2);
  check_tensor("grouped_gemm", "weight", weight, storage,
               {offsets.size(0), transpose_weight ? width : depth, transpose_weight ? depth : width});
  at::Tensor out = at::empty({num_rows, width}, x.options());
  const Slices slices("grouped_gemm", offsets, num_rows, inner);
  for_slices(slices, [&](const auto& next) {
    Buffer x_buffer, out_buffer;
    ExpertWeight expert_weight(weights, inner);
    while (const Slice* slice = next()) {
      for (int64_t begin = slice->begin; begin < slice->end; begin += slices.piece) {
        const int64_t end = std::min(begin + slices.piece, slice->end), rows = end - begin;
        void* product = storage == inner ? mutable_row(out, begin) : out_buffer.get(rows * width, inner);
        multiply(product, {widened(x, begin, end, inner, x_buffer), rows, depth},
                 {expert_weight.of(slice->expert), weight.size(1), weight.size(2), transpose_weight}, inner);
        if (storage != inner) {
          round_to(out, begin, product, rows * width, inner);
        }
      }
    }
  });
  const int64_t skipped = num_rows - slices.num_rows;
  std::memset(mutable_row(out, slices.num_rows), 0, skipped * width * out.element_size());
  return out;
}

at::Tensor grouped_gemm_weight(const at::Tensor& x_MD, const at::Tensor& y_MN, const at::Tensor& offsets_E) {
  check_floats("grouped_gemm_weight", {x_MD, y_MN});
  check_tensor("grouped_gemm_weight", "y_MN", y_MN, x_MD.scalar_type(), {x_MD.size(0), -1});
  const at::Tensor x = x_MD.contiguous(), y = y_MN.contiguous(), offsets = offsets_E.contiguous();
  const auto inner = inner_dtype(x.scalar_type());
  const int64_t depth = x.size(1), width = y.size(1);
  const Slices slices("grouped_gemm_weight", offsets, x.size(0), inner);
  at::Tensor out = at::empty({offsets.size(0), width, depth}, x.options());
  const WeightGradient gradient(out, slices, inner);
  for_slices(slices, [&](const auto& next) {
    Buffer x_buffer, y_buffer, sum_buffer;
    while (const Slice* slice = next()) {
      void* sum = gradient.begin(*slice, sum_buffer);
      for (int64_t begin = slice->begin; begin < slice->end; begin += slices.piece) {
        const int64_t end = std::min(begin + slices.piece, slice->end), rows = end - begin;
        multiply(
            sum, {widened(y, begin, end, inner, y_buffer), rows, width, true},
            {widened(x, begin, end, inner, x_buffer), rows, depth}, inner, begin > slice->begin);
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
