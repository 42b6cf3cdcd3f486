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

// In all of these a buffer of a piece begins with the row `begin` of the call.

struct GatherArgs {
  at::ScalarType storage, inner;
  const void* rows;      // storage
  const int32_t* order;  // [M]: row m is a copy of row order[m] / top_k; null: of row m
  int64_t top_k;
  int64_t width;
  void* out;  // inner
};

struct SwigluArgs {
  at::ScalarType storage, inner;
  const void* gate_up;  // inner [m, 2F]
  void* kept;           // storage [m, 2F], or null
  const void* weights;  // acc [T K]
  const int32_t* order;
  int64_t width;  // F
  void* out;      // inner [m, F]
};

struct SwigluGradientArgs {
  at::ScalarType storage, inner;
  const void* gate_up;     // storage [m, 2F]
  const void* grad_inner;  // inner [m, F], or null: only the activation is wanted
  const void* weights;     // acc [T K]
  const int32_t* order;
  int64_t width;
  void* activation;    // inner [m, F], or null
  void* grad_gate_up;  // inner [m, 2F], or null
  void* grad_weights;  // acc [T K], or null
};

struct GatherSumArgs {
  at::ScalarType storage, inner;
  const void* rows;     // inner [M, D]
  const int32_t* slot;  // [T, K]
  int64_t top_k;
  int64_t num_rows;  // slots from here on were skipped
  int64_t width;
  void* out;  // storage [T, D]
};

struct SumArgs {
  at::ScalarType storage, inner;
  const void* parts;  // inner
  int64_t num_parts;
  int64_t part_stride;
  void* out;  // storage; elements begin..end of it and of each part
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

struct Dispatch {
  at::Tensor order_M, slot_TK, offsets_E;  // int32
};
Dispatch dispatch_by_expert(const at::Tensor& expert_ids_TK, int64_t num_experts);

// What a tensor of this dtype is multiplied in.
at::ScalarType inner_dtype(at::ScalarType storage);

// Rows begin..end of an expert. Those of an expert with several slices have a number: their sums are added in the end.
struct Slice {
  int64_t expert, begin, end;
  int64_t part = -1;
};

struct Slices {
  std::vector<Slice> all;  // at least one for each expert, though it be empty
  int64_t num_rows = 0;    // of all experts
  int64_t longest = 0;
  int64_t num_parts = 0;
  int64_t piece;  // rows that go through all steps together
  Slices(const char* op, const at::Tensor& offsets_E, int64_t num_rows, at::ScalarType inner);
};

// A matrix in row-major memory, or the transpose of one.
struct Matrix {
  const void* data;
  int64_t rows, columns;
  bool transposed = false;
};

// out = a b, or out += a b, on the thread of a slice.
void multiply(void* out, const Matrix& a, const Matrix& b, at::ScalarType dtype, bool add = false);

// Memory of one thread, allocated when it is first asked for.
class Buffer {
 public:
  void* get(int64_t numel, at::ScalarType dtype);

 private:
  at::Tensor memory_;
};

// The weights of experts in the inner dtype, one at a time.
class ExpertWeight {
 public:
  ExpertWeight(const at::Tensor& weight, at::ScalarType inner) : weight_(weight), inner_(inner) {}
  const void* of(int64_t expert);

 private:
  at::Tensor weight_;
  at::ScalarType inner_;
  int64_t expert_ = -1;
  const void* found_ = nullptr;
  Buffer copy_;
};

// d weight of each expert, summed over its slices in order and rounded once.
class WeightGradient {
 public:
  WeightGradient(const at::Tensor& out, const Slices& slices, at::ScalarType inner);
  // Where the products of a slice are added; `buffer` is the thread's.
  void* begin(const Slice& slice, Buffer& buffer) const;
  void end(const Slice& slice, const void* sum) const;
  void add_parts(const Slices& slices) const;

 private:
  at::Tensor out_, parts_;  // [E, ..], and [parts, ..] in the inner dtype
  at::ScalarType inner_;
};

// Runs worker(next) on each thread; next() gives slice after slice, null when none is left.
template <typename Worker>
void for_slices(const Slices& slices, const Worker& worker) {
  std::atomic<size_t> taken{0};
  const auto next = [&]() -> const Slice* {
    const size_t i = taken++;
    return i < slices.all.size() ? &slices.all[i] : nullptr;
  };
  // As many iterations as threads: a parallel region even for one slice, because outside of one the product of that
  // slice would be cut over the threads, and its bits would depend on their number.
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      worker(next);
    }
  });
}

// Elements of a row x[i] of a contiguous tensor, and where one begins. Not by strides: torch leaves that of a dimension
// of size 1 as it was.
inline int64_t row_numel(const at::Tensor& x) {
  return x.numel() / std::max<int64_t>(x.size(0), 1);
}

inline const void* const_row(const at::Tensor& x, int64_t row) {
  return static_cast<const char*>(x.const_data_ptr()) + row * row_numel(x) * x.element_size();
}

inline void* mutable_row(const at::Tensor& x, int64_t row) {
  return static_cast<char*>(x.mutable_data_ptr()) + row * row_numel(x) * x.element_size();
}

// Rows begin..end of x in the inner dtype: where they lie, or a widened copy.
const void* widened(const at::Tensor& x, int64_t begin, int64_t end, at::ScalarType inner, Buffer& buffer);

// Writes `numel` values of the inner dtype to rows of x from `row` on.
void round_to(const at::Tensor& x, int64_t row, const void* values, int64_t numel, at::ScalarType inner);

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
