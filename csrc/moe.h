// What the CPU ops of mixture-of-experts layers share: passes over rows (cpu/moe_rows.cpp), products of one thread, and
// how rows that are sorted by expert are cut into tasks.
//
//   rows       | expert 0 | expert 1          | expert 2 |    M = T K, sorted by expert
//   slices     |    0     |    1    |    2    |    3     |    a task each: a thread takes the next one when it is free
//   pieces     |  |  |  | |  |  |  ||  |  |   |  |  |  | |    through all steps of a slice while they are in the cache
//
// A slice is cut by sizes alone and runs on one thread, its products too: the same bits for any number of threads, and
// one wait of all threads per call, where a product of its own per expert waits after each.
//
// Storage is the dtype of the tensors, inner what is multiplied: fp32 for bf16 where the CPU has no products of bf16.
#pragma once

#include "operator.h"

namespace r1fast {

// A matrix in row-major memory, or the transpose of one; null where there is none.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, columns = 0;
  at::ScalarType dtype = at::kFloat;
  bool transposed = false;

  Matrix t() const { return {data, rows, columns, dtype, !transposed}; }
  Matrix flat() const { return {data, 1, rows * columns, dtype}; }
  int64_t bytes() const { return rows * columns * static_cast<int64_t>(c10::elementSize(dtype)); }
  Matrix slice(int64_t begin, int64_t end) const {
    return {static_cast<char*>(data) + Matrix{nullptr, begin, columns, dtype}.bytes(), end - begin, columns, dtype};
  }
};

struct GatherArgs {
  Matrix from, to;       // storage, inner
  const int32_t* order;  // row m of `to` is a copy of row order[m] / top_k; null: of row m
  int64_t top_k;
};

struct SwigluArgs {
  Matrix gate_up;        // inner [m, 2F]
  Matrix kept;           // storage [m, 2F], or null
  Matrix out;            // inner [m, F]
  const void* weights;   // acc [T K]
  const int32_t* order;  // [m]
};

struct SwigluGradientArgs {
  at::ScalarType inner;
  Matrix gate_up;     // storage [m, 2F]
  Matrix grad_inner;  // inner [m, F], or null: only the activation is wanted
  Matrix activation, grad_gate_up;  // inner [m, F] and [m, 2F], or null
  const void* weights;              // acc [T K]
  void* grad_weights;               // acc [T K], or null
  const int32_t* order;             // [m]
};

struct GatherSumArgs {
  Matrix rows;          // inner [.., D]; slots behind them were skipped
  Matrix out;           // storage [T, D]
  const int32_t* slot;  // [T, K]
  int64_t top_k;
};

struct SumArgs {
  Matrix parts, out;  // inner, storage; elements begin..end of all rows of `parts`
};

R1FAST_DECLARE(moe_gather, GatherArgs);
R1FAST_DECLARE(moe_swiglu, SwigluArgs);
R1FAST_DECLARE(moe_swiglu_gradient, SwigluGradientArgs);
R1FAST_DECLARE(moe_gather_sum, GatherSumArgs);
R1FAST_DECLARE(moe_sum, SumArgs);

}  // namespace r1fast

#ifdef R1FAST_BUILD_OPERATOR

#include <atomic>

namespace r1fast {

// order_M, slot_TK, offsets_E (int32) of the choices of `op`
std::tuple<at::Tensor, at::Tensor, at::Tensor> sort_by_expert(
    const char* op, const at::Tensor& expert_ids_TK, int64_t num_experts);

// What a tensor of this dtype is multiplied in.
at::ScalarType inner_dtype(at::ScalarType storage);

// Rows begin..end of an expert. Those of an expert with several slices have a number: their sums are added in the end.
struct Slice {
  int64_t expert, begin, end;
  int64_t part = -1;
};

struct Slices {
  std::vector<Slice> all;  // at least one for each expert, though it be empty
  std::vector<Slice> cut;  // experts with several, and the numbers of these
  int64_t num_rows = 0;    // of all experts
  int64_t num_parts = 0;
  int64_t piece;  // rows that go through all steps together
  Slices(const char* op, const at::Tensor& offsets_E, int64_t num_rows, at::ScalarType inner);
};

// Rows x[i] of a contiguous tensor, and the matrix x[i] of three dimensions. Not by strides: torch leaves that of a
// dimension of size 1 as it was. Inputs are only read, outputs are new: neither is a copy on write.
inline Matrix rows_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.size(0), x.numel() / std::max<int64_t>(x.size(0), 1),
          x.scalar_type()};
}

inline Matrix matrix_of(const at::Tensor& x, int64_t i) {
  return {rows_of(x).slice(i, i + 1).data, x.size(1), x.size(2), x.scalar_type()};
}

// out = a b, or out += a b, on the thread of a slice.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add = false);

void set_zero(const Matrix& x);

// Memory of one thread, which keeps what is in it while it need not grow.
class Buffer {
 public:
  Matrix get(int64_t rows, int64_t columns, at::ScalarType dtype);

 private:
  at::Tensor memory_;
};

// The weights of experts [E, .., ..] in the inner dtype, one at a time.
class ExpertWeight {
 public:
  Matrix of(const at::Tensor& weight, int64_t expert, at::ScalarType inner);

 private:
  int64_t expert_ = -1;
  Matrix found_;
  Buffer copy_;
};

// d weight of each expert, summed over its slices in order and rounded once.
class WeightGradient {
 public:
  WeightGradient(const at::Tensor& out, const Slices& slices, at::ScalarType inner);
  // y^T x of rows begin..end of a slice; `buffer` is the thread's, for this sum alone.
  void add(const Slice& slice, int64_t begin, int64_t end, const Matrix& y, const Matrix& x, Buffer& buffer) const;
  void add_parts(const Slices& slices) const;

 private:
  at::Tensor out_, parts_;  // [E, ..], and [parts, ..] in the inner dtype
};

// Runs work(memory, slice, begin, end) for each piece; a thread has a Memory of its own, and takes slice after slice.
template <typename Memory, typename Work>
void for_pieces(const Slices& slices, const Work& work) {
  std::atomic<size_t> taken{0};
  // As many iterations as threads: a parallel region even for one slice, because outside of one the product of that
  // slice would be cut over the threads, and its bits would depend on their number.
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Memory memory;
    for (size_t i = taken++; i < slices.all.size(); i = taken++) {
      const Slice& slice = slices.all[i];
      for (int64_t begin = slice.begin; begin < slice.end; begin += slices.piece) {
        work(memory, slice, begin, std::min(begin + slices.piece, slice.end));
      }
    }
  });
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
