// Passes over the rows of mixture-of-experts layers: each reads its inputs once and writes its outputs once.
#include "../moe.h"

namespace r1fast {
namespace {

// Calls f.operator()<Storage, Inner>().
template <typename F>
inline void by_dtypes(at::ScalarType storage, at::ScalarType inner, const F& f) {
  if (storage == at::kBFloat16 && inner == at::kFloat) {
    f.template operator()<at::BFloat16, float>();
  } else {
    by_dtype(storage, [&]<typename T>() { f.template operator()<T, T>(); });
  }
}

// As for_parts, with a constant for whole pairs: rows of experts are short. (Not for all: where the compiler fuses products
// with sums depends on the loop, and with it the last bit of rms_norm.)
template <typename acc, typename F>
inline void for_pairs(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + kPair<acc> <= width; i += kPair<acc>) {
    f(i, kPair<acc>);
  }
  if (i < width) {
    f(i, width - i);
  }
}

template <typename T>
inline T* row_of(const Matrix& x, int64_t i) {
  return static_cast<T*>(x.data) + i * x.columns;
}

template <typename From, typename To>
void pass(const GatherArgs& args, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const From* x = row_of<From>(args.from, args.order == nullptr ? m : args.order[m] / args.top_k);
    To* out = row_of<To>(args.to, m);
    if constexpr (std::is_same_v<From, To>) {
      std::copy_n(x, args.to.columns, out);
    } else {
      for_pairs<acc_t<To>>(args.to.columns, [&](int64_t i, int64_t size) {
        const auto [a, b] = load_part(x + i, size);
        store_part(out + i, size, a, b);
      });
    }
  }
}

template <typename Storage, typename Inner>
void pass(const SwigluArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const int64_t width = args.out.columns;
  for (int64_t m = begin; m < end; ++m) {
    const Inner* gate = row_of<Inner>(args.gate_up, m);
    const Inner* up = gate + width;
    Inner* out = row_of<Inner>(args.out, m);
    const Vec<acc> weight(static_cast<const acc*>(args.weights)[args.order[m]]);
    const auto swiglu = [&](const Vec<acc>& g, const Vec<acc>& u) { return g * sigmoid<acc>(g) * u * weight; };
    for_pairs<acc>(width, [&](int64_t i, int64_t size) {
      const auto [g0, g1] = load_part(gate + i, size);
      const auto [u0, u1] = load_part(up + i, size);
      store_part(out + i, size, swiglu(g0, u0), swiglu(g1, u1));
      if (args.kept.data != nullptr) {
        Storage* kept = row_of<Storage>(args.kept, m) + i;
        store_part(kept, size, g0, g1);
        store_part(kept + width, size, u0, u1);
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
  return {h * weight, grad_h * u * s * fmadd(g, one - s, one), grad_h * silu, grad_inner * h};
}

template <typename Storage, typename Inner>
void pass(const SwigluGradientArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const int64_t width = args.gate_up.columns / 2;
  for (int64_t m = begin; m < end; ++m) {
    const Storage* gate = row_of<Storage>(args.gate_up, m);
    const Inner* grad_inner = row_of<Inner>(args.grad_inner, m);
    Inner* activation = row_of<Inner>(args.activation, m);
    Inner* grad_gate = row_of<Inner>(args.grad_gate_up, m);
    const Vec<acc> weight(static_cast<const acc*>(args.weights)[args.order[m]]);
    Vec<acc> sum_a(0), sum_b(0);
    for_pairs<acc>(width, [&](int64_t i, int64_t size) {
      const auto [g0, g1] = load_part(gate + i, size);
      const auto [u0, u1] = load_part(gate + width + i, size);
      Vec<acc> d0(0), d1(0);
      if (args.grad_inner.data != nullptr) {
        std::tie(d0, d1) = load_part(grad_inner + i, size);
      }
      const auto a = swiglu_gradient<acc>(g0, u0, d0, weight);
      const auto b = swiglu_gradient<acc>(g1, u1, d1, weight);
      if (args.activation.data != nullptr) {
        store_part(activation + i, size, a.activation, b.activation);
      }
      if (args.grad_gate_up.data != nullptr) {
        store_part(grad_gate + i, size, a.gate, b.gate);
        store_part(grad_gate + width + i, size, a.up, b.up);
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
void pass(const GatherSumArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const int64_t width = args.out.columns;
  const Inner* rows = row_of<Inner>(args.rows, 0);
  for (int64_t t = begin; t < end; ++t) {
    Storage* out = row_of<Storage>(args.out, t);
    const int32_t* slot = args.slot + t * args.top_k;
    for_pairs<acc>(width, [&](int64_t i, int64_t size) {
      Vec<acc> sum_a(0), sum_b(0);
      for (int64_t k = 0; k < args.top_k; ++k) {
        if (slot[k] < args.rows.rows) {
          const auto [a, b] = load_part(rows + slot[k] * width + i, size);
          sum_a = sum_a + a;
          sum_b = sum_b + b;
        }
      }
      store_part(out + i, size, sum_a, sum_b);
    });
  }
}

template <typename Storage, typename Inner>
void pass(const SumArgs& args, int64_t begin, int64_t end) {
  using acc = acc_t<Inner>;
  const Inner* parts = row_of<Inner>(args.parts, 0) + begin;
  Storage* out = row_of<Storage>(args.out, 0) + begin;
  for_pairs<acc>(end - begin, [&](int64_t i, int64_t size) {
    auto [sum_a, sum_b] = load_part(parts + i, size);
    for (int64_t part = 1; part < args.parts.rows; ++part) {
      const auto [a, b] = load_part(parts + part * args.parts.columns + i, size);
      sum_a = sum_a + a;
      sum_b = sum_b + b;
    }
    store_part(out + i, size, sum_a, sum_b);
  });
}

template <typename Args>
void run(at::ScalarType storage, at::ScalarType inner, const Args& args, int64_t begin, int64_t end) {
  by_dtypes(storage, inner, [&]<typename Storage, typename Inner>() { pass<Storage, Inner>(args, begin, end); });
}

}  // namespace

R1FAST_KERNEL(moe_gather, GatherArgs) { run(args.from.dtype, args.to.dtype, args, begin, end); }

R1FAST_KERNEL(moe_swiglu, SwigluArgs) {
  run((args.kept.data == nullptr ? args.gate_up : args.kept).dtype, args.gate_up.dtype, args, begin, end);
}

R1FAST_KERNEL(moe_swiglu_gradient, SwigluGradientArgs) { run(args.gate_up.dtype, args.inner, args, begin, end); }
R1FAST_KERNEL(moe_gather_sum, GatherSumArgs) { run(args.out.dtype, args.rows.dtype, args, begin, end); }
R1FAST_KERNEL(moe_sum, SumArgs) { run(args.out.dtype, args.parts.dtype, args, begin, end); }

}  // namespace r1fast
