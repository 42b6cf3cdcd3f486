// One product per expert, and what its slices, widened weights and sums are (moe.h); the products are the vendor's.
#ifdef R1FAST_BUILD_OPERATOR

#include "../moe.h"

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

// Looked up once; a test may set it.
std::atomic<bool>& widens_bf16() {
  static std::atomic<bool> widens{!torch_multiplies_bf16()};
  return widens;
}

at::Tensor tensor_of(const Matrix& x) {
  const auto options = at::TensorOptions().dtype(x.dtype);
  return x.transposed ? at::from_blob(x.data, {x.columns, x.rows}, {1, std::max<int64_t>(x.columns, 1)}, options)
                      : at::from_blob(x.data, {x.rows, x.columns}, options);
}

int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace

at::ScalarType inner_dtype(at::ScalarType storage) {
  return storage == at::kBFloat16 && widens_bf16() ? at::kFloat : storage;
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
    const bool is_cut = end - num_rows > most;
    const int64_t first_part = num_parts;
    int64_t begin = num_rows;
    do {
      const int64_t stop = std::min(begin + most, end);
      all.push_back({expert, begin, stop, is_cut ? num_parts++ : -1});
      begin = stop;
    } while (begin < end);
    if (is_cut) {
      cut.push_back({expert, first_part, num_parts});
    }
    num_rows = end;
  }
}

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add) {
  at::Tensor product = tensor_of(out);
  mm_into(product, tensor_of(a), tensor_of(b), add);
}

void set_zero(const Matrix& x) {
  std::memset(x.data, 0, x.bytes());
}

Matrix Buffer::get(int64_t rows, int64_t columns, at::ScalarType dtype) {
  Matrix found{nullptr, rows, columns, dtype};
  if (!memory_.defined() || memory_.numel() < found.bytes()) {
    memory_ = at::empty({found.bytes()}, at::TensorOptions().dtype(at::kByte));
  }
  found.data = memory_.mutable_data_ptr();
  return found;
}

namespace {

// In the inner dtype: where it lies, or a copy.
Matrix widened(const Matrix& x, at::ScalarType inner, Buffer& buffer) {
  if (x.dtype == inner) {
    return x;
  }
  const Matrix copy = buffer.get(x.rows, x.columns, inner);
  R1FAST_PICK(moe_gather)({x.flat(), copy.flat(), nullptr, 1}, 0, 1);
  return copy;
}

// To the dtype of `out`.
void round_to(const Matrix& out, const Matrix& x) {
  R1FAST_PICK(moe_sum)({x.flat(), out}, 0, x.rows * x.columns);
}

}  // namespace

Matrix ExpertWeight::of(const at::Tensor& weight, int64_t expert, at::ScalarType inner) {
  if (expert != expert_) {
    found_ = widened(matrix_of(weight, expert), inner, copy_);
    expert_ = expert;
  }
  return found_;
}

WeightGradient::WeightGradient(const at::Tensor& out, const Slices& slices, at::ScalarType inner) : out_(out) {
  if (slices.num_parts > 0) {
    parts_ = at::empty({slices.num_parts, out.size(1), out.size(2)}, out.options().dtype(inner));
  }
  for (const Slice& slice : slices.all) {
    if (slice.begin == slice.end) {
      set_zero(matrix_of(out_, slice.expert));
    }
  }
}

void WeightGradient::add(
    const Slice& slice, int64_t begin, int64_t end, const Matrix& y, const Matrix& x, Buffer& buffer) const {
  const Matrix out = matrix_of(out_, slice.expert);
  const bool is_part = slice.part >= 0, in_place = out.dtype == x.dtype;
  const Matrix sum = is_part    ? matrix_of(parts_, slice.part)
                     : in_place ? out
                                : buffer.get(out.rows, out.columns, x.dtype);
  multiply(sum, y.t(), x, begin > slice.begin);
  if (!is_part && !in_place && end == slice.end) {
    round_to(out, sum);
  }
}

void WeightGradient::add_parts(const Slices& slices) const {
  for (const Slice& cut : slices.cut) {
    const SumArgs args{rows_of(parts_).slice(cut.begin, cut.end), matrix_of(out_, cut.expert)};
    run_rows(R1FAST_PICK(moe_sum), args, args.parts.columns, 1);
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
  struct Memory {
    Buffer x, out;
    ExpertWeight weight;
  };
  for_pieces<Memory>(slices, [&](Memory& memory, const Slice& slice, int64_t begin, int64_t end) {
    const Matrix rows = rows_of(out).slice(begin, end);
    const Matrix product = storage == inner ? rows : memory.out.get(rows.rows, width, inner);
    const Matrix expert_weight = memory.weight.of(weights, slice.expert, inner);
    multiply(product, widened(rows_of(x).slice(begin, end), inner, memory.x),
             transpose_weight ? expert_weight.t() : expert_weight);
    if (storage != inner) {
      round_to(rows, product);
    }
  });
  set_zero(rows_of(out).slice(slices.num_rows, num_rows));
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
  struct Memory {
    Buffer x, y, sum;
  };
  for_pieces<Memory>(slices, [&](Memory& memory, const Slice& slice, int64_t begin, int64_t end) {
    gradient.add(slice, begin, end, widened(rows_of(y).slice(begin, end), inner, memory.y),
                 widened(rows_of(x).slice(begin, end), inner, memory.x), memory.sum);
  });
  gradient.add_parts(slices);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("grouped_gemm", &grouped_gemm);
  m.impl("grouped_gemm_weight", &grouped_gemm_weight);
}

// For tests of both: whether bf16 is widened. Returns what was before.
TORCH_LIBRARY_FRAGMENT(r1fast, m) {
  m.def("_set_widens_bf16(bool widens) -> bool", [](bool widens) { return widens_bf16().exchange(widens); });
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
