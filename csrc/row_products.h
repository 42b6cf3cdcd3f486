// Products of rows in panels (decode_layers.h) with weights where and as they lie in the model, and who computes them:
// the thread that asks, or all, each some channels of every row. Neither changes a bit.
#pragma once

#include "layer_args.h"
#include "panels.h"

#include <c10/macros/Macros.h>

#include <initializer_list>

namespace r1fast {

// Threads that do the tasks of one of them, worker 0 (cpu/decode_layers.cpp).
class Team {
 public:
  using Task = void (*)(const void* context, int64_t task, int64_t worker);
  // Calls task(context, 0..count - 1, worker), on whichever threads come.
  virtual void run(Task task, const void* context, int64_t count) = 0;
};

namespace {

// Rows of a weight at a time: as many as there are registers for.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kWeightRows = 8;
#else
constexpr int kWeightRows = 6;
#endif
static_assert(kWeightRows <= kStrip, "what products write behind the last channel");

// In bf16 or fp32 (T), multiplied in units of `Unit`.
template <typename T, typename Unit>
class RowProducts {
 protected:
  using V = Vec<float>;
  using Floats = Sheet<float>;
  using Units = Sheet<Unit>;

  // team: null for one thread.
  RowProducts(Team* team, int64_t workers) : team_(team), workers_(workers), widened_(workers), strips_(workers) {}

  // f(task, worker)
  template <typename F>
  void share(int64_t count, const F& f) {
    if (team_ != nullptr && count > 1) {
      const auto call = [](const void* context, int64_t task, int64_t worker) {
        (*static_cast<const F*>(context))(task, worker);
      };
      return team_->run(call, &f, count);
    }
    for (int64_t task = 0; task < count; ++task) {
      f(task, 0);
    }
  }

  // Of `size`, a multiple of `unit`. Some for each thread: one that is late leaves the rest to the others.
  int64_t part_of(int64_t size, int64_t unit) const {
    return team_ == nullptr ? size : padded(size / (4 * workers_) + 1, unit);
  }

  struct Linear {
    Floats out;
    const Weight &weight, &bias;
  };

  Floats linear(SheetMemory<float>& memory, const Units& in, const Weight& weight, const Weight& bias,
                const Layout& layout) {
    const Floats out = memory.get(layout, weight.outputs);
    linears(in, {{out, weight, bias}}, layout);
    return out;
  }

  // Of the same rows, in one go.
  void linears(const Units& in, std::initializer_list<Linear> all, const Layout& layout) {
    int64_t outputs = 0, tasks = 0;
    for (const Linear& one : all) {
      outputs += one.weight.outputs;
    }
    const int64_t per_task = part_of(outputs, kWeightRows);
    for (const Linear& one : all) {
      tasks += (one.weight.outputs + per_task - 1) / per_task;
    }
    share(tasks, [&](int64_t task, int64_t worker) {
      const Linear* one = all.begin();
      for (int64_t of_one; task >= (of_one = (one->weight.outputs + per_task - 1) / per_task); ++one) {
        task -= of_one;
      }
      const int64_t begin = task * per_task, end = std::min(begin + per_task, one->weight.outputs);
      project(one->out, 0, in, 0, one->weight, layout, one->bias, begin, end, worker);
      round(one->out, begin, end, layout);
    });
  }

  template <typename U>
  void project(const Floats& out, int64_t out_at, const Sheet<U>& in, int64_t in_at, const Weight& weight,
               const Layout& layout) {
    project(out, out_at, in, in_at, weight, layout, {}, 0, weight.outputs, 0);
  }

  // Channels out_at + begin.. of `out` from channels in_at.. of `in`. Up to a strip, what lies behind the last channel of
  // a weight is overwritten; begin: a multiple of kWeightRows.
  template <typename U>
  void project(const Floats& out, int64_t out_at, const Sheet<U>& in, int64_t in_at, const Weight& weight,
               const Layout& layout, const Weight& bias_weight, int64_t begin, int64_t end, int64_t worker) {
    const T* bias = static_cast<const T*>(bias_weight.data);
    for (int64_t n = begin; n < end; n += kWeightRows) {
      const Left<U> weights = strip<U>(weight, n, worker);
      fetch(weight, n + kWeightRows);
      for (const Panel& panel : layout.panels) {
        float* to = out.at(panel, out_at + n);
        product_rows<kWeightRows>(to, panel.width, weights, Right<U>{in.at(panel, in_at), panel.width},
                                  weight.inputs / kValues<U>, panel.width, false);
        for (int64_t i = 0; bias != nullptr && i < std::min<int64_t>(kWeightRows, weight.outputs - n); ++i) {
          const V value(static_cast<float>(bias[n + i]));
          for (int64_t j = i * panel.width; j < (i + 1) * panel.width; j += kLanes<float>) {
            (V::loadu(to + j) + value).store(to + j);
          }
        }
      }
    }
  }

  static void round(const Floats& x, int64_t channels, const Layout& layout) { round(x, 0, channels, layout); }

  // To what T holds.
  static void round(const Floats& x, int64_t begin, int64_t end, const Layout& layout) {
    if constexpr (!std::is_same_v<T, float>) {
      for (const Panel& panel : layout.panels) {
        float* values = x.at(panel);
        for (int64_t i = begin * panel.width; i < end * panel.width; i += kPair<float>) {
          const auto [a, b] = rounded_pair<T>(V::loadu(values + i), V::loadu(values + i + kLanes<float>));
          a.store(values + i);
          b.store(values + i + kLanes<float>);
        }
      }
    }
  }

 private:
  // Rows n.. of a weight to the second-level cache.
  C10_ALWAYS_INLINE static void fetch(const Weight& weight, int64_t n) {
    const T* first = static_cast<const T*>(weight.data) + n * weight.inputs;
    const int64_t size = std::min<int64_t>(kWeightRows, weight.outputs - n) * weight.inputs;
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(first + i, 0, 2);
    }
  }

  // Rows n.. of a weight: where they lie, or widened, or with zeros below the last.
  template <typename U>
  Left<U> strip(const Weight& weight, int64_t n, int64_t worker) {
    constexpr bool as_it_is = kValues<U> == 2 || std::is_same_v<T, U>;
    const int64_t inputs = weight.inputs, rows = std::min<int64_t>(kWeightRows, weight.outputs - n);
    const T* first = static_cast<const T*>(weight.data) + n * inputs;
    if (as_it_is && rows == kWeightRows) {
      return {reinterpret_cast<const U*>(first), inputs / kValues<U>, 1};
    }
    using Value = std::conditional_t<kValues<U> == 2, T, U>;
    Value* copy = strip_memory<Value>(worker).get(kWeightRows * inputs);
    for (int64_t i = 0; i < rows * inputs; ++i) {
      copy[i] = first[i];
    }
    std::fill(copy + rows * inputs, copy + kWeightRows * inputs, Value(0.f));
    return {reinterpret_cast<const U*>(copy), inputs / kValues<U>, 1};
  }

  template <typename Value>
  Scratch<Value>& strip_memory(int64_t worker) {
    if constexpr (std::is_same_v<Value, float>) {
      return widened_[worker];
    } else {
      return strips_[worker];
    }
  }

  Team* const team_;
  const int64_t workers_;
  std::vector<Scratch<float>> widened_;  // of each worker
  std::vector<Scratch<T>> strips_;
};

}  // namespace
}  // namespace r1fast
