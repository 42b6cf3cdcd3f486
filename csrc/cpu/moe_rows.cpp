// Passes over the rows of mixture-of-experts layers: each reads its inputs once and writes its outputs once.
#include "../moe.h"

namespace r1fast {
namespace {
inline namespace CPU_CAPABILITY {

// Calls f.operator()<Storage, Inner>().
template <typename F>
inline void by_dtypes(at::ScalarType storage, at::ScalarType inner, const F& f) {
  if (storage == at::kBFloat16 && inner == at::kFloat) {
    f.template operator()<at::BFloat16, float>();
  } else {
    by_dtype(storage, [&]<typename T>() { f.template operator()<T, T>(); });
  }
}

// The last columns of a row, with zeros behind them up to a pair of vectors.
template <typename T>
struct Tail {
  T values[kPair<acc_t<T>>] = {};
  Tail(const T* x, int64_t size) { std::copy_n(x, size, values); }
  Tail() = default;
};

// f(column, load, store) for each pair of columns: load(x) reads the pair at a pointer, store(x, a, b) writes one.
template <typename acc, typename F>
inline void for_pairs(int64_t width, const F& f) {
  const int64_t whole = width - width % kPair<acc>;
  for (int64_t i = 0; i < whole; i += kPair<acc>) {
    f(
        i, [](const auto* x) { return load_pair(x); },
        [](auto* x, const Vec<acc>& a, const Vec<acc>& b) { store_pair(x, a, b); });
  }
  if (const int64_t rest = width - whole) {
    f(
        whole,
        [rest]<typename T>(const T* x) {
          const Tail<T> tail(x, rest);
          return load_pair(tail.values);
        },
        [rest]<typename T>(T* x, const Vec<acc>& a, const Vec<acc>& b) {
          Tail<T> tail;
          store_pair(tail.values, a, b);
          std::copy_n(tail.values, rest, x);
        });
  }
}

template <typename From, typename To>
void gather_rows(const GatherArgs& args, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int64_t row = args.order == nullptr ? m : args.order[m] / args.top_k;
    const From* x = static_cast<const From*>(args.rows) + row * args.width;
    To* out = static_cast<To*>(args.out) + (m - begin) * args.width;
    if constexpr (std::is_same_v<From, To>) {
      std::copy_n(x, args.width, out);
    } else {
      for_pairs<acc_t<To>>(args.width, [&](int64_t i, const auto& load, const auto& store) {
        const auto [a, b] = load(x + i);
        store(out + i, a, b);
      });
    }
  }
}

template <typename Storage, typename Inner>
void swiglu_rows(const SwigluArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  for (int64_t m = begin; m < end; ++m) {
    const Inner* gate = static_cast<const Inner*>(args.gate_up) + (m - begin) * 2 * args.width;
    const Inner* up = gate + args.width;
    Inner* out = static_cast<Inner*>(args.out) + (m - begin) * args.width;
    const Vec<acc> weight(static_cast<const acc*>(args.weights)[args.order[m]]);
    const auto swiglu = [&](const Vec<acc>& g, const Vec<acc>& u) { return g * sigmoid<acc>(g) * u * weight; };
    for_pairs<acc>(args.width, [&](int64_t i, const auto& load, const auto& store) {
      const auto [g0, g1] = load(gate + i);
      const auto [u0, u1] = load(up + i);
      store(out + i, swiglu(g0, u0), swiglu(g1, u1));
      if (args.kept != nullptr) {
        Storage* kept = static_cast<Storage*>(args.kept) + (m - begin) * 2 * args.width + i;
        store(kept, g0, g1);
        store(kept + args.width, u0, u1);
      }
    });
  }
}

template <typename acc>
struct SwigluGradient {
  Vec<acc> activation, gate, up, product;  // h w, d gate, d up, and the terms of d w
};

template <typename acc>
inline SwigluGradient<acc> swiglu_gradient(
    const Vec<acc>& g, const Vec<acc>& u, const Vec<acc>& grad_inner, const Vec<acc>& weight) {
  const Vec<acc> one(1);
  const Vec<acc> s = sigmoid<acc>(g);
  const Vec<acc> silu = g * s;
  const Vec<acc> h = silu * u;
  const Vec<acc> grad_h = grad_inner * weight;
  return {h * weight, grad_h * u * s * at::vec::fmadd(g, one - s, one), grad_h * silu, grad_inner * h};
}

template <typename Storage, typename Inner>
void swiglu_gradient_rows(const SwigluGradientArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const int64_t width = args.width;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t i_m = m - begin;
    const Storage* gate = static_cast<const Storage*>(args.gate_up) + i_m * 2 * width;
    const Inner* grad_inner = static_cast<const Inner*>(args.grad_inner) + i_m * width;
    Inner* activation = static_cast<Inner*>(args.activation) + i_m * width;
    Inner* grad_gate = static_cast<Inner*>(args.grad_gate_up) + i_m * 2 * width;
    const Vec<acc> weight(static_cast<const acc*>(args.weights)[args.order[m]]);
    Vec<acc> sum_a(0), sum_b(0);
    for_pairs<acc>(width, [&](int64_t i, const auto& load, const auto& store) {
      const auto [g0, g1] = load(gate + i);
      const auto [u0, u1] = load(gate + width + i);
      Vec<acc> d0(0), d1(0);
      if (args.grad_inner != nullptr) {
        std::tie(d0, d1) = load(grad_inner + i);
      }
      const auto a = swiglu_gradient<acc>(g0, u0, d0, weight);
      const auto b = swiglu_gradient<acc>(g1, u1, d1, weight);
      if (args.activation != nullptr) {
        store(activation + i, a.activation, b.activation);
      }
      if (args.grad_gate_up != nullptr) {
        store(grad_gate + i, a.gate, b.gate);
        store(grad_gate + width + i, a.up, b.up);
      }
      sum_a = sum_a + a.product;
      sum_b = sum_b + b.product;
    });
    if (args.grad_weights != nullptr) {
      static_cast<acc*>(args.grad_weights)[args.order[m]] = reduce_sum<acc>(sum_a + sum_b);
    }
  }
}

template <typename Storage, typename Inner>
void gather_sum_rows(const GatherSumArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const Inner* rows = static_cast<const Inner*>(args.rows);
  for (int64_t t = begin; t < end; ++t) {
    Storage* out = static_cast<Storage*>(args.out) + t * args.width;
    const int32_t* slot = args.slot + t * args.top_k;
    for_pairs<acc>(args.width, [&](int64_t i, const auto& load, const auto& store) {
      Vec<acc> sum_a(0), sum_b(0);
      for (int64_t k = 0; k < args.top_k; ++k) {
        if (slot[k] < args.num_rows) {
          const auto [a, b] = load(rows + slot[k] * args.width + i);
          sum_a = sum_a + a;
          sum_b = sum_b + b;
        }
      }
      store(out + i, sum_a, sum_b);
    });
  }
}

template <typename Storage, typename Inner>
void sum_parts(const SumArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const Inner* parts = static_cast<const Inner*>(args.parts) + begin;
  Storage* out = static_cast<Storage*>(args.out) + begin;
  for_pairs<acc>(end - begin, [&](int64_t i, const auto& load, const auto& store) {
    auto [sum_a, sum_b] = load(parts + i);
    for (int64_t part = 1; part < args.num_parts; ++part) {
      const auto [a, b] = load(parts + part * args.part_stride + i);
      sum_a = sum_a + a;
      sum_b = sum_b + b;
    }
    store(out + i, sum_a, sum_b);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace

R1FAST_KERNEL(moe_gather, GatherArgs) {
  by_dtypes(args.storage, args.inner, [&]<typename Storage, typename Inner>() {
    gather_rows<Storage, Inner>(args, begin, end);
  });
}

R1FAST_KERNEL(moe_swiglu, SwigluArgs) {
  by_dtypes(args.storage, args.inner, [&]<typename Storage, typename Inner>() {
    swiglu_rows<Storage, Inner>(args, begin, end);
  });
}

R1FAST_KERNEL(moe_swiglu_gradient, SwigluGradientArgs) {
  by_dtypes(args.storage, args.inner, [&]<typename Storage, typename Inner>() {
    swiglu_gradient_rows<Storage, Inner>(args, begin, end);
  });
}

R1FAST_KERNEL(moe_gather_sum, GatherSumArgs) {
  by_dtypes(args.storage, args.inner, [&]<typename Storage, typename Inner>() {
    gather_sum_rows<Storage, Inner>(args, begin, end);
  });
}

R1FAST_KERNEL(moe_sum, SumArgs) {
  by_dtypes(args.storage, args.inner, [&]<typename Storage, typename Inner>() {
    sum_parts<Storage, Inner>(args, begin, end);
  });
}

}  // namespace r1fast
