// Small matrix products of one thread, for ops that keep their operands in the cache (cpu/packed_attention.cpp).
//
//   C [8, N] (+)= A [8, S] B [S, N]     S steps, N a multiple of 16
//
// A unit is what one step multiplies: a float or a double, or a pair of neighbouring bf16 values where the CPU adds the
// products of such pairs in fp32 (avx512_bf16: four times the rate of fp32).
#pragma once

#include "simd.h"

#include <memory>

namespace r1fast {
namespace {

struct BF16Pair {
  uint32_t bits;  // the first value in the low half
};

// Values that one unit holds, along the dimension that is summed.
template <typename Unit>
constexpr int64_t kValues = std::is_same_v<Unit, BF16Pair> ? 2 : 1;

constexpr int64_t kStrip = 8;   // rows of A and C
constexpr int64_t kBlock = 16;  // rows and columns are padded to this

inline int64_t padded(int64_t size, int64_t unit = kBlock) {
  return (size + unit - 1) / unit * unit;
}

// Unit (i, s) of A is data[i * row + s * step]: row-major, or the transpose of rows.
template <typename Unit>
struct Left {
  const Unit* data;
  int64_t row, step;
};

// Unit (s, n) of B is data[s * step + n].
template <typename Unit>
struct Right {
  const Unit* data;
  int64_t step;
};

// Up to 8 rows of A at one step. Three pointers: eight would be more than there are registers for.
template <typename Unit>
class RowPointers {
 public:
  explicit RowPointers(const Left<Unit>& a)
      : row_(a.row), step_(a.step), first_(a.data), fourth_(a.data + 3 * a.row), seventh_(a.data + 6 * a.row) {}
  const Unit& operator[](int i) const { return (i < 3 ? first_ : i < 6 ? fourth_ : seventh_)[i % 3 * row_]; }
  void advance() {
    first_ += step_;
    fourth_ += step_;
    seventh_ += step_;
    // Opaque to the compiler, which else makes eight of three again and moves them through vector registers.
    asm("" : "+r"(first_), "+r"(fourth_), "+r"(seventh_));
  }

 private:
  const int64_t row_, step_;
  const Unit *first_, *fourth_, *seventh_;
};

#define R1FAST_UNROLL _Pragma("GCC unroll 8")

#ifdef CPU_CAPABILITY_AVX512
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;  // 16 registers
#endif

// A sum of its own, added to C in the end: sums of many blocks lose less than one running sum.
template <int rows, int vectors, typename Unit>
inline void tile(Unit* c, int64_t c_row, const Left<Unit>& a, const Unit* b, int64_t b_step, int64_t steps,
                 bool add) {
  using V = Vec<Unit>;
  constexpr int64_t lanes = kLanes<Unit>;
  V sum[rows][vectors];
  R1FAST_UNROLL for (int i = 0; i < rows; ++i) {
    R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
      sum[i][v] = V(0);
    }
  }
  RowPointers<Unit> left_of(a);
  for (int64_t s = 0; s < steps; ++s, left_of.advance(), b += b_step) {
    V right[vectors];
    R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
      right[v] = V::loadu(b + v * lanes);
    }
    R1FAST_UNROLL for (int i = 0; i < rows; ++i) {
      const V left(left_of[i]);
      R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
        sum[i][v] = fmadd(left, right[v], sum[i][v]);
      }
    }
  }
  R1FAST_UNROLL for (int i = 0; i < rows; ++i) {
    R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
      Unit* out = c + i * c_row + v * lanes;
      (add ? V::loadu(out) + sum[i][v] : sum[i][v]).store(out);
    }
  }
}

#ifdef CPU_CAPABILITY_AVX512
#define R1FAST_HAS_BF16_PAIRS
#define R1FAST_BF16_TARGET __attribute__((target("avx512bf16")))

inline bool cpu_multiplies_bf16() {
  return __builtin_cpu_supports("avx512bf16");
}

template <int rows, int vectors>
R1FAST_BF16_TARGET inline void tile(float* c, int64_t c_row, const Left<BF16Pair>& a, const BF16Pair* b, int64_t b_step,
                                    int64_t steps, bool add) {
  __m512 sum[rows][vectors];
  R1FAST_UNROLL for (int i = 0; i < rows; ++i) {
    R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
      sum[i][v] = _mm512_setzero_ps();
    }
  }
  RowPointers<BF16Pair> left_of(a);
  for (int64_t s = 0; s < steps; ++s, left_of.advance(), b += b_step) {
    __m512bh right[vectors];
    R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
      right[v] = (__m512bh)_mm512_loadu_si512(b + v * 16);
    }
    R1FAST_UNROLL for (int i = 0; i < rows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(left_of[i].bits));
      R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
        sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
      }
    }
  }
  R1FAST_UNROLL for (int i = 0; i < rows; ++i) {
    R1FAST_UNROLL for (int v = 0; v < vectors; ++v) {
      float* out = c + i * c_row + v * 16;
      _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), sum[i][v]) : sum[i][v]);
    }
  }
}

// fp32 to bf16, a multiple of 16 values.
R1FAST_BF16_TARGET inline void round_row(BF16Pair* out, const float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), rounded);
  }
}

// The same of two rows: a unit holds a value of each.
R1FAST_BF16_TARGET inline void round_across(BF16Pair* out, const float* a, const float* b, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + i)));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + i)));
    _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#else
inline bool cpu_multiplies_bf16() {
  return false;
}
#endif

template <int rows, typename Unit>
inline void product_rows(acc_t<Unit>* c, int64_t c_row, const Left<Unit>& a, const Right<Unit>& b, int64_t steps,
                         int64_t columns, bool add) {
  constexpr int64_t lanes = kLanes<acc_t<Unit>>;
  int64_t n = 0;
  for (; n + 2 * lanes <= columns; n += 2 * lanes) {
    tile<rows, 2>(c + n, c_row, a, b.data + n, b.step, steps, add);
  }
  if (n < columns) {
    tile<rows, 1>(c + n, c_row, a, b.data + n, b.step, steps, add);
  }
}

// `rows`: of A and C that count, the others are left or take anything.
template <typename Unit>
inline void product(acc_t<Unit>* c, int64_t c_row, const Left<Unit>& a, const Right<Unit>& b, int64_t steps,
                    int64_t columns, bool add, int64_t rows = kStrip) {
  int64_t i = 0;
  for (; i + kTileRows <= padded(rows, 4); i += kTileRows) {
    product_rows<kTileRows>(c + i * c_row, c_row, {a.data + i * a.row, a.row, a.step}, b, steps, columns, add);
  }
  if (i < rows) {
    product_rows<4>(c + i * c_row, c_row, {a.data + i * a.row, a.row, a.step}, b, steps, columns, add);
  }
}

// out[j, i] = x[i, j] for units; rows and columns multiples of 16.
template <typename Unit>
inline void transpose(Unit* out, int64_t out_row, const Unit* x, int64_t x_row, int64_t rows, int64_t columns) {
  using Word = std::conditional_t<std::is_same_v<Unit, BF16Pair>, float, Unit>;  // moved, never computed with
  for (int64_t i = 0; i < rows; i += kBlock) {
    for (int64_t j = 0; j < columns; j += kBlock) {
      transpose_mxn<Word, kBlock, kBlock>(
          reinterpret_cast<const Word*>(x + i * x_row + j), x_row, reinterpret_cast<Word*>(out + j * out_row + i),
          out_row);
    }
  }
}

// Memory that grows and is never initialized.
template <typename T>
class Scratch {
 public:
  bool grows(int64_t size) const { return size > size_; }
  T* get(int64_t size) {
    if (grows(size)) {
      memory_.reset(new T[size]);
      size_ = size;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace r1fast
