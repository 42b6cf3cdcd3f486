// What the CPU kernels share: vectors of float or double read from any dtype, the choice of a build, and exponentials.
//
// Every file in csrc/cpu is compiled three times (setup.py): plain, AVX2 and AVX512. The plain build also holds the
// operators, which pick a kernel when they run.
//
//   namespace { ... }                                          the code that is compiled three times
//   R1FAST_KERNEL(name, Args) { ... args, begin, end ... }     its entry: rows begin..end of one call
//   R1FAST_DECLARE(name, Args)                                 for a kernel that another file calls
//   #ifdef R1FAST_BUILD_OPERATOR ... R1FAST_PICK(name) ...     the entry of the best build for this processor
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#define R1FAST_PASTE_(a, b) a##b
#define R1FAST_PASTE(a, b) R1FAST_PASTE_(a, b)

#define R1FAST_DECLARE(name, Args)                                   \
  void name##_DEFAULT(const Args& args, int64_t begin, int64_t end); \
  void name##_AVX2(const Args& args, int64_t begin, int64_t end);    \
  void name##_AVX512(const Args& args, int64_t begin, int64_t end)

#define R1FAST_KERNEL(name, Args) \
  R1FAST_DECLARE(name, Args);     \
  void R1FAST_PASTE(name##_, CPU_CAPABILITY)(const Args& args, int64_t begin, int64_t end)

namespace r1fast {
namespace {

// What a dtype is computed in.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Not public in torch (built and tested with 2.13): whatever of at::vec the kernels use has its name from here.
template <typename acc>
using Vec = at::vec::Vectorized<acc>;
using at::vec::fmadd;
using at::vec::maximum;
using at::vec::minimum;
using at::vec::transpose_mxn;

template <typename acc>
constexpr acc kInf = std::numeric_limits<acc>::infinity();

template <typename acc>
constexpr int64_t kLanes = Vec<acc>::size();

// The unit of every loop is a pair of vectors: as many values as one vector of bf16 holds.
template <typename acc>
constexpr int64_t kPair = 2 * kLanes<acc>;

template <typename T>
inline std::pair<Vec<acc_t<T>>, Vec<acc_t<T>>> load_pair(const T* x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    auto [a, b] = at::vec::convert_to_float<at::BFloat16>(Vec<at::BFloat16>::loadu(x));
    return {a, b};
  } else {
    return {Vec<T>::loadu(x), Vec<T>::loadu(x + kLanes<T>)};
  }
}

template <typename T>
inline void store_pair(T* x, const Vec<acc_t<T>>& a, const Vec<acc_t<T>>& b) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    at::vec::convert_from_float<at::BFloat16>(a, b).store(x);
  } else {
    a.store(x);
    b.store(x + kLanes<T>);
  }
}

// Rounded to what T holds.
template <typename T>
inline std::pair<Vec<acc_t<T>>, Vec<acc_t<T>>> rounded_pair(const Vec<acc_t<T>>& a, const Vec<acc_t<T>>& b) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    auto [x, y] = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(a, b));
    return {x, y};
  } else {
    return {a, b};
  }
}

template <typename T>
inline auto load_part(const T* x, int64_t size) {
  if (size == kPair<acc_t<T>>) {
    return load_pair(x);
  }
  T padded[kPair<acc_t<T>>] = {};
  std::copy(x, x + size, padded);
  return load_pair(static_cast<const T*>(padded));
}

template <typename T>
inline void store_part(T* x, int64_t size, const Vec<acc_t<T>>& a, const Vec<acc_t<T>>& b) {
  if (size == kPair<acc_t<T>>) {
    return store_pair(x, a, b);
  }
  T padded[kPair<acc_t<T>>];
  store_pair(padded, a, b);
  std::copy(padded, padded + size, x);
}

// f(first column, how many) over a row; what lies beyond its end is loaded as 0.
template <typename acc, typename F>
inline void for_parts(int64_t width, const F& f) {
  for (int64_t i = 0; i < width; i += kPair<acc>) {
    f(i, std::min(kPair<acc>, width - i));
  }
}

// Lane by lane the larger one, in one instruction; a NaN in x stays, a NaN in the bound is replaced.
template <typename acc>
inline Vec<acc> at_least(const Vec<acc>& bound, const Vec<acc>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc, float>) {
    return _mm512_max_ps(bound, x);  // the second operand where one of them is NaN
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<acc, float>) {
    return _mm256_max_ps(bound, x);
  }
#endif
  return at::vec::maximum(bound, x);
}

// e^(scale x + offset) for results of at most about 1: 0 for -inf, NaN for NaN. To the last bit or two.
template <typename acc>
class Exponential {
 public:
  explicit Exponential(double scale, double offset = 0)
      : scale_(static_cast<acc>(scale)), offset_(static_cast<acc>(offset)) {}
  Vec<acc> operator()(const Vec<acc>& x) const { return at::vec::fmadd(x, scale_, offset_).exp(); }

 private:
  Vec<acc> scale_, offset_;
};

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Half the instructions of the library's: no arguments above 0, no reduction in two steps, and log2(e) inside the scale.
template <>
class Exponential<float> {
 public:
  explicit Exponential(double scale, double offset = 0)
      : scale_(static_cast<float>(std::min(scale * kLog2E, kLargest))), offset_(static_cast<float>(offset * kLog2E)) {}

  Vec<float> operator()(const Vec<float>& x) const {
    const Vec<float> y = at_least(Vec<float>(kZeroBelow), at::vec::fmadd(x, scale_, offset_));
    const Vec<float> whole = y.round();
    const Vec<float> f = y - whole;
    // 2^f on [-1/2, 1/2], minimax of the relative error: 1.9e-9, 8e-8 with the rounding of fp32.
    Vec<float> p(1.534581242594868e-4f);
    for (const float c : {1.3399930903688073e-3f, 9.618489071726799e-3f, 5.550328642129898e-2f, 2.4022646248340607e-1f,
                          6.931471824645996e-1f, 1.f}) {
      p = at::vec::fmadd(p, f, Vec<float>(c));
    }
    return times_power_of_two(p, whole);
  }

 private:
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLargest = std::numeric_limits<float>::max();  // not inf: times a distance of 0 it is 0
#ifdef CPU_CAPABILITY_AVX512
  static constexpr float kZeroBelow = -151;

  static Vec<float> times_power_of_two(const Vec<float>& p, const Vec<float>& whole) {
    return _mm512_scalef_ps(p, whole);
  }
#else
  // 1 times 2^-127 is the bits of 0; results below 2^-126 have an absolute error of that much.
  static constexpr float kZeroBelow = -127;

  static Vec<float> times_power_of_two(const Vec<float>& p, const Vec<float>& whole) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }
#endif
  Vec<float> scale_, offset_;
};
#endif

template <typename acc>
inline Vec<acc> sigmoid(const Vec<acc>& x) {
  // e^-|x| <= 1: never infinite, and in the range of the short exponential.
  const Exponential<acc> exponential(-1);
  const Vec<acc> one(1);
  const Vec<acc> e = exponential(x.abs());
  const Vec<acc> positive = one / (one + e);
  return Vec<acc>::blendv(positive, e * positive, x < Vec<acc>(0));
}

template <typename acc>
inline acc reduce_sum(const Vec<acc>& v) {
  return at::vec::vec_reduce_all<acc>([](const Vec<acc>& a, const Vec<acc>& b) { return a + b; }, v);
}

template <typename acc>
inline acc reduce_max(const Vec<acc>& v) {
  return at::vec::vec_reduce_all<acc>([](const Vec<acc>& a, const Vec<acc>& b) { return at::vec::maximum(a, b); }, v);
}

// Calls f.operator()<T>() for the C++ type of a dtype that the operators let through.
template <typename F>
inline void by_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kDouble) {
    f.template operator()<double>();
  } else if (dtype == at::kBFloat16) {
    f.template operator()<at::BFloat16>();
  } else {
    f.template operator()<float>();
  }
}

}  // namespace
}  // namespace r1fast
