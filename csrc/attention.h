// What attention over packed sequences and over a cache share: the running softmax of a strip of 8 queries.
#pragma once

#include "tile.h"

#include <cmath>
#include <cstring>

namespace r1fast {

constexpr int64_t kNoWindow = std::numeric_limits<int64_t>::max() / 2;

namespace {

// Scores of keys before `first` and from `visible` on are not seen.
template <typename acc>
inline void hide(acc* scores, int64_t first, int64_t visible, int64_t columns) {
  if (first > 0) {
    std::fill(scores, scores + std::min(first, columns), -kInf<acc>);
  }
  if (visible < columns) {
    std::fill(scores + std::max<int64_t>(visible, 0), scores + columns, -kInf<acc>);
  }
}

// Scores x to tanh(by x): times the soft cap, by which the softmax then scales them, the capped scores.
template <typename acc>
inline void soften(acc* scores, double by, int64_t columns) {
  const Vec<acc> factor(static_cast<acc>(by));
  for (int64_t j = 0; j < columns; j += kLanes<acc>) {
    (Vec<acc>::loadu(scores + j) * factor).tanh().store(scores + j);
  }
}

// Of block after block of keys: the maximum, the sum of exponentials, and the sum of values that they weigh.
template <typename acc>
class StripSoftmax {
 public:
  // soft_cap 0: none.
  StripSoftmax(double scale, double soft_cap, int64_t value_width)
      : columns(padded(value_width)), scale_(soft_cap > 0 ? soft_cap : scale),
        softened_by_(soft_cap > 0 ? scale / soft_cap : 0), out_(new acc[kStrip * columns]) {}

  void start() {
    std::fill(top_, top_ + kStrip, -kInf<acc>);
    std::fill(total_, total_ + kStrip, acc(0));
  }

  // Scores of query i to exponentials, in place; `again`: what was summed before is scaled to the new maximum. Of the
  // first block of keys one at least has to be seen.
  void fold(int64_t i, acc* row, int64_t first, int64_t visible, int64_t size, bool again) {
    constexpr int64_t lanes = kLanes<acc>;
    if (softened_by_ > 0) {
      soften(row, softened_by_, size);
    }
    hide(row, first, visible, size);
    Vec<acc> highest = Vec<acc>::loadu(row);
    for (int64_t j = lanes; j < size; j += lanes) {
      highest = maximum(highest, Vec<acc>::loadu(row + j));
    }
    const acc top = std::max(top_[i], static_cast<acc>(scale_) * reduce_max<acc>(highest));
    const Exponential<acc> exponential(scale_, -static_cast<double>(top));
    Vec<acc> sum(0);
    for (int64_t j = 0; j < size; j += lanes) {
      const Vec<acc> e = exponential(Vec<acc>::loadu(row + j));
      e.store(row + j);
      sum = sum + e;
    }
    if (again) {
      const acc kept = std::exp(top_[i] - top);
      total_[i] *= kept;
      scale(i, kept);
    }
    total_[i] += reduce_sum<acc>(sum);
    top_[i] = top;
  }

  acc* sums() { return out_.get(); }  // [8, columns], to be added to

  const acc* finish(int64_t i) {
    scale(i, 1 / total_[i]);
    return out_.get() + i * columns;
  }

  acc lse(int64_t i) const { return top_[i] + std::log(total_[i]); }

  const int64_t columns;

 private:
  void scale(int64_t i, acc by) {
    acc* out = out_.get() + i * columns;
    for (int64_t j = 0; j < columns; ++j) {
      out[j] *= by;
    }
  }

  const double scale_, softened_by_;
  std::unique_ptr<acc[]> out_;
  acc top_[kStrip], total_[kStrip];
};

template <typename T>
inline void widen(acc_t<T>* out, const T* x, int64_t size) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    std::copy_n(x, size, out);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      out[i] = x[i];
    }
  }
}

// Rounds to the nearest, ties to even. Rows of heads are short: a loop that the compiler vectorizes, not pairs of vectors.
template <typename T>
inline void narrow(T* out, const acc_t<T>* x, int64_t size) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    std::copy_n(x, size, out);
  } else {
    for (int64_t i = 0; i < size; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof(bits));
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      out[i].x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
    }
  }
}

}  // namespace
}  // namespace r1fast
