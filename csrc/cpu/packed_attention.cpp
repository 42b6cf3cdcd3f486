// Causal attention inside packed sequences, forward and backward, with the rotation of queries and keys.
//
// A task is a sequence and a key head, with all query heads that read it. Its keys and values are rotated and laid out
// for products once; then strips of 8 queries pass over the keys before them, in blocks, and their scores never leave
// the cache:
//
//                keys   | block 0  | block 1  |
//   strip of 8 queries  | s p o    | s p o
//   strip               | s p o    | s p o    .      only as many keys as the strip may see, in steps of 16
//
// With a window the first block begins where that of the strip's first query does, and so holds keys for all 8.
//
// Every sum of a task is taken in one order by one thread: the same bits for any number of threads.
#include "../operator.h"
#include "../packed_attention.h"

#include <numeric>

namespace r1fast {
namespace {

constexpr int64_t kForwardKeys = 256;  // keys of a block: its part of K^T and V stays in the second-level cache
constexpr int64_t kBackwardKeys = 128;
constexpr int64_t kQueries = 64;
constexpr int64_t kKeyStep = 16;

template <typename T, typename Unit>
class Forward : Task<T, Unit> {
  using Base = Task<T, Unit>;
  using acc = acc_t<T>;
  using Base::args_, Base::first_, Base::length_, Base::kv_head_, Base::group_;

 public:
  explicit Forward(const AttentionArgs& args)
      : Base(args), softmax_(args.scale, args.soft_cap, args.value_width), scores_(new acc[kStrip * kForwardKeys]),
        probs_(new Unit[kStrip * kForwardKeys]) {
    queries_.resize(kStrip, args.width);
  }

  void run() {
    while (Base::next()) {
      Base::read_keys(keys_);
      Base::read_values(values_, args_.v, kv_head_);
      keys_S_ = keys_.over_channels(length_);
      values_S_ = values_.over_rows(length_);
      for (int64_t head = kv_head_ * group_; head < (kv_head_ + 1) * group_; ++head) {
        for (int64_t begin = 0; begin < length_; begin += kStrip) {
          strip(head, begin);
        }
      }
    }
  }

 private:
  void strip(int64_t head, int64_t begin) {
    const int64_t rows = std::min(kStrip, length_ - begin);
    Base::read_queries(queries_, head, begin, begin + rows);
    softmax_.start();
    const int64_t first = std::max<int64_t>(0, begin + 1 - args_.window) / kKeyStep * kKeyStep;
    for (int64_t key = first; key < begin + rows; key += kForwardKeys) {
      const int64_t columns = padded(std::min(kForwardKeys, begin + kStrip - key));
      product<Unit>(scores_.get(), kForwardKeys, queries_.strip(0), {keys_S_.data + key, keys_S_.step},
                    (args_.width + kValues<Unit> - 1) / kValues<Unit>, columns, false);
      for (int64_t i = 0; i < kStrip; ++i) {
        const int64_t visible = begin + i + 1 - key;
        softmax_.fold(i, scores_.get() + i * kForwardKeys, visible - args_.window, visible, columns, key > first);
      }
      const Left<Unit> probs = as_units(columns);
      const Right<Unit> values{values_S_.data + key / kValues<Unit> * values_S_.step, values_S_.step};
      product<Unit>(softmax_.sums(), softmax_.columns, probs, values, columns / kValues<Unit>, softmax_.columns,
                    key > first);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = (first_ + begin + i) * args_.num_heads + head;
      narrow(static_cast<T*>(args_.out) + row * args_.value_width, softmax_.finish(i), args_.value_width);
      static_cast<acc*>(args_.lse)[row] = softmax_.lse(i);
    }
  }

  Left<Unit> as_units(int64_t columns) {
    if constexpr (kValues<Unit> == 2) {
#ifdef R1FAST_HAS_BF16_PAIRS
      for (int64_t i = 0; i < kStrip * kForwardKeys; i += kForwardKeys) {
        round_row(probs_.get() + i, scores_.get() + i, columns);
      }
#endif
      return {probs_.get(), kForwardKeys, 1};
    } else {
      return {scores_.get(), kForwardKeys, 1};
    }
  }

  Rows<T, Unit> queries_, keys_, values_;
  Right<Unit> keys_S_{}, values_S_{};
  StripSoftmax<acc> softmax_;
  std::unique_ptr<acc[]> scores_;
  std::unique_ptr<Unit[]> probs_;
};

template <typename T, typename Unit>
class Backward : Task<T, Unit> {
  using Base = Task<T, Unit>;
  using acc = acc_t<T>;
  using Base::args_, Base::first_, Base::length_, Base::kv_head_, Base::group_, Base::half_, Base::plain_;
  static constexpr int64_t kV = kValues<Unit>;

 public:
  explicit Backward(const AttentionArgs& args)
      : Base(args), scores_(new acc[kStrip * kBackwardKeys]), grad_scores_(new acc[kStrip * kBackwardKeys]),
        probs_(new Unit[kQueries / kV * kBackwardKeys]), grads_(new Unit[kQueries / kV * kBackwardKeys]),
        grad_rows_(new Unit[kStrip * kBackwardKeys]), columns_(padded(args.width)),
        value_columns_(padded(args.value_width)) {}

  void run() {
    while (Base::next()) {
      const int64_t rows = padded(length_);
      Base::read_keys(keys_);
      Base::read_values(values_, args_.v, kv_head_);
      keys_S_ = keys_.over_channels(length_);
      keys_D_ = keys_.over_rows(length_);
      values_S_ = values_.over_channels(length_);
      grad_keys_ = zeros(grad_keys_memory_, rows * columns_);
      grad_values_ = zeros(grad_values_memory_, rows * value_columns_);
      for (int64_t head = kv_head_ * group_; head < (kv_head_ + 1) * group_; ++head) {
        one_head(head);
      }
      write_keys();
    }
  }

 private:
  static acc* zeros(Scratch<acc>& memory, int64_t size) {
    acc* data = memory.get(size);
    std::fill(data, data + size, acc(0));
    return data;
  }

  void one_head(int64_t head) {
    queries_.resize(length_, args_.width);
    Base::read_queries(queries_, head, 0, length_);
    const Heads grad_out{args_.grad_out, args_.num_heads * args_.value_width, args_.value_width};
    Base::read_values(grad_out_, grad_out, head);
    queries_D_ = queries_.over_rows(length_);
    grad_out_D_ = grad_out_.over_rows(length_);
    grad_queries_ = zeros(grad_queries_memory_, padded(length_) * columns_);
    read_rows(head, grad_out);
    for (int64_t key = 0; key < length_; key += kBackwardKeys) {
      const int64_t end = std::min(length_, key + kBackwardKeys + std::min(args_.window, length_));  // of who sees them
      for (int64_t query = key / kQueries * kQueries; query < end; query += kQueries) {
        block(key, query);
      }
    }
    write_queries(head);
  }

  // lse, and the sum of grad_out * out, of each query.
  void read_rows(int64_t head, const Heads& grad_out) {
    lse_ = lse_memory_.get(padded(length_));
    delta_ = delta_memory_.get(padded(length_));
    acc* out = Base::scratch_.get();
    acc* grad = out + args_.value_width;
    for (int64_t i = 0; i < length_; ++i) {
      const int64_t row = (first_ + i) * args_.num_heads + head;
      widen(out, static_cast<const T*>(args_.out) + row * args_.value_width, args_.value_width);
      widen(grad, Base::at(grad_out, first_ + i, head), args_.value_width);
      acc sum = 0;
      for (int64_t j = 0; j < args_.value_width; ++j) {
        sum += out[j] * grad[j];
      }
      delta_[i] = sum;
      lse_[i] = static_cast<const acc*>(args_.lse)[row];
    }
    // Of the rows of padding every probability is 0.
    std::fill(lse_ + length_, lse_ + padded(length_), kInf<acc>);
    std::fill(delta_ + length_, delta_ + padded(length_), acc(0));
  }

  // Keys from `key` and queries from `query` on: what each gives to the gradients of the other.
  void block(int64_t key, int64_t query) {
    const int64_t queries = std::min(kQueries, padded(length_, kStrip) - query);
    const int64_t keys = std::min(kBackwardKeys, padded(length_) - key);
    for (int64_t i = 0; i < queries; i += kStrip) {
      if (query + i + kStrip > key) {
        strip(key, query, i, std::min(keys, padded(query + i + kStrip - key)));
      }
    }
    const int64_t even = padded(queries, kStrip);
    for (int64_t j = 0; j < keys && key + j < query + queries; j += kStrip) {
      // Queries before these keys do not see them.
      const int64_t from = std::max<int64_t>(0, key + j - query), steps = (even - from) / kV;
      const Unit* grads = grads_.get() + from / kV * kBackwardKeys + j;
      const Unit* probs = probs_.get() + from / kV * kBackwardKeys + j;
      const int64_t row = (query + from) / kV;
      product<Unit>(grad_keys_ + (key + j) * columns_, columns_, {grads, 1, kBackwardKeys},
                    {queries_D_.data + row * queries_D_.step, queries_D_.step}, steps, columns_, true);
      product<Unit>(grad_values_ + (key + j) * value_columns_, value_columns_, {probs, 1, kBackwardKeys},
                    {grad_out_D_.data + row * grad_out_D_.step, grad_out_D_.step}, steps, value_columns_, true);
    }
  }

  void strip(int64_t key, int64_t query, int64_t i, int64_t columns) {
    constexpr bool in_place = kV == 1;  // then probabilities are left where they are computed
    acc *p = scores_.get(), *ds = grad_scores_.get();
    if constexpr (in_place) {
      p = probs_.get() + i * kBackwardKeys;
      ds = grads_.get() + i * kBackwardKeys;
    }
    product<Unit>(p, kBackwardKeys, queries_.strip(query + i), {keys_S_.data + key, keys_S_.step},
                  (args_.width + kV - 1) / kV, columns, false);
    product<Unit>(ds, kBackwardKeys, grad_out_.strip(query + i), {values_S_.data + key, values_S_.step},
                  (args_.value_width + kV - 1) / kV, columns, false);
    for (int64_t r = 0; r < kStrip; ++r) {
      probabilities(p + r * kBackwardKeys, ds + r * kBackwardKeys, query + i + r, key, columns);
    }
    Left<Unit> grads{grad_rows_.get(), kBackwardKeys, 1};
    if constexpr (in_place) {
      grads.data = ds;
    }
#ifdef R1FAST_HAS_BF16_PAIRS
    else {
      for (int64_t r = 0; r < kStrip; r += 2) {
        const int64_t at = r * kBackwardKeys, below = at + kBackwardKeys, pairs = (i + r) / 2 * kBackwardKeys;
        round_across(probs_.get() + pairs, p + at, p + below, columns);
        round_across(grads_.get() + pairs, ds + at, ds + below, columns);
        round_row(grad_rows_.get() + at, ds + at, columns);
        round_row(grad_rows_.get() + below, ds + below, columns);
      }
    }
#endif
    product<Unit>(grad_queries_ + (query + i) * columns_, columns_, grads,
                  {keys_D_.data + key / kV * keys_D_.step, keys_D_.step}, columns / kV, columns_, true);
  }

  void probabilities(acc* p, acc* ds, int64_t query, int64_t key, int64_t columns) const {
    constexpr int64_t lanes = kLanes<acc>;
    const bool capped = args_.soft_cap > 0;
    const Vec<acc> delta(delta_[query]);
    if (capped) {
      cap(p, ds, delta, columns);
    }
    hide(p, query + 1 - key - args_.window, query + 1 - key, columns);
    const Exponential<acc> exponential(capped ? args_.soft_cap : args_.scale, -static_cast<double>(lse_[query]));
    const Vec<acc> taken = capped ? Vec<acc>(0) : delta;
    for (int64_t j = 0; j < columns; j += lanes) {
      const Vec<acc> e = exponential(Vec<acc>::loadu(p + j));
      e.store(p + j);
      (e * (Vec<acc>::loadu(ds + j) - taken)).store(ds + j);
    }
  }

  // Scores as forward; ds less delta, times the slope of the cap, 1 - tanh^2.
  void cap(acc* p, acc* ds, const Vec<acc>& delta, int64_t columns) const {
    soften(p, args_.scale / args_.soft_cap, columns);
    for (int64_t j = 0; j < columns; j += kLanes<acc>) {
      const Vec<acc> t = Vec<acc>::loadu(p + j);
      ((Vec<acc>::loadu(ds + j) - delta) * (Vec<acc>(1) - t * t)).store(ds + j);
    }
  }

  // grad of what was rotated -> of what came in, times the scale; `rotary` null: left as it is, in its own place.
  void write_row(T* plain, T* rotary, acc* parts, const acc* grad, int64_t token) const {
    acc* scaled = Base::scratch_.get();
    acc* turned = scaled + args_.width;
    const acc scale = static_cast<acc>(args_.scale);
    for (int64_t j = 0; j < args_.width; ++j) {
      scaled[j] = grad[j] * scale;
    }
    narrow(plain, scaled, plain_);
    if (parts != nullptr) {
      std::copy_n(scaled + plain_, 2 * half_, parts);
    } else if (half_ > 0) {
      rotate_back(turned, scaled + plain_, Base::cos(token), Base::sin(token), half_, args_.interleaved);
      narrow(rotary, turned, 2 * half_);
    }
  }

  void write_queries(int64_t head) const {
    for (int64_t i = 0; i < length_; ++i) {
      T* out = static_cast<T*>(args_.grad_q) + ((first_ + i) * args_.num_heads + head) * args_.width;
      write_row(out, out + plain_, nullptr, grad_queries_ + i * columns_, first_ + i);
    }
  }

  void write_keys() const {
    const bool shared = args_.k_pe.data != nullptr;
    for (int64_t i = 0; i < length_; ++i) {
      const int64_t row = (first_ + i) * args_.num_kv_heads + kv_head_;
      T* out = static_cast<T*>(args_.grad_k) + row * (shared ? plain_ : args_.width);
      acc* parts = shared ? static_cast<acc*>(args_.k_pe_parts) + row * args_.rotary_width : nullptr;
      write_row(out, out + plain_, parts, grad_keys_ + i * columns_, first_ + i);
      narrow(static_cast<T*>(args_.grad_v) + row * args_.value_width, grad_values_ + i * value_columns_,
             args_.value_width);
    }
  }

  Rows<T, Unit> queries_, keys_, values_, grad_out_;
  Right<Unit> keys_S_{}, keys_D_{}, values_S_{}, queries_D_{}, grad_out_D_{};
  Scratch<acc> grad_queries_memory_, grad_keys_memory_, grad_values_memory_, lse_memory_, delta_memory_;
  acc *grad_queries_ = nullptr, *grad_keys_ = nullptr, *grad_values_ = nullptr, *lse_ = nullptr, *delta_ = nullptr;
  std::unique_ptr<acc[]> scores_, grad_scores_;
  std::unique_ptr<Unit[]> probs_, grads_, grad_rows_;
  const int64_t columns_, value_columns_;
};

template <template <typename, typename> class Pass>
void run_pass(const AttentionArgs& args) {
  by_dtype(args.dtype, [&]<typename T>() {
#ifdef R1FAST_HAS_BF16_PAIRS
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      if (cpu_multiplies_bf16()) {
        return Pass<T, BF16Pair>(args).run();
      }
    }
#endif
    Pass<T, acc_t<T>>(args).run();
  });
}

}  // namespace

// Tasks until none is left, whatever the range says.
R1FAST_KERNEL(attention_forward, AttentionArgs) { run_pass<Forward>(args); }
R1FAST_KERNEL(attention_backward, AttentionArgs) { run_pass<Backward>(args); }

// Tokens begin..end: the gradient of rotated channels that all heads share.
R1FAST_KERNEL(attention_shared_gradient, AttentionArgs) {
  by_dtype(args.dtype, [&]<typename T>() {
    using acc = acc_t<T>;
    const int64_t width = args.rotary_width, half = width / 2;
    std::unique_ptr<acc[]> sum(new acc[2 * width]);
    for (int64_t t = begin; t < end; ++t) {
      const acc* parts = static_cast<const acc*>(args.k_pe_parts) + t * args.num_kv_heads * width;
      std::copy_n(parts, width, sum.get());
      for (int64_t head = 1; head < args.num_kv_heads; ++head) {
        for (int64_t j = 0; j < width; ++j) {
          sum[j] += parts[head * width + j];
        }
      }
      rotate_back(
          sum.get() + width, sum.get(), static_cast<const T*>(args.cos) + t * half,
          static_cast<const T*>(args.sin) + t * half, half, args.interleaved);
      narrow(static_cast<T*>(args.grad_k_pe) + t * width, sum.get() + width, width);
    }
  });
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

// The tensors of a call in the form that the kernels read; keeps them alive.
class Call {
 public:
  AttentionArgs args{};

  Call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& k_pe,
       const OptionalTensor& cos, const OptionalTensor& sin, const at::Tensor& cu_seqlens, double scale,
       bool interleaved, std::optional<int64_t> window, std::optional<double> soft_cap)
      : q_(with_unit_columns(q)), k_(with_unit_columns(k)), v_(with_unit_columns(v)),
        cu_seqlens_(cu_seqlens.contiguous()) {
    check_floats("packed_attention", {q, k, v});
    TORCH_CHECK_VALUE(
        cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1, "packed_attention: got cu_seqlens ",
        cu_seqlens.sizes(), " in ", cu_seqlens.scalar_type(), ", expected int32 [N+1]");
    if (cos.has_value()) {
      cos_ = cos->contiguous();
      sin_ = sin->contiguous();
      args.rotary_width = 2 * cos_.size(-1);
      args.cos = cos_.const_data_ptr();
      args.sin = sin_.const_data_ptr();
    }
    if (k_pe.has_value()) {
      k_pe_ = with_unit_columns(*k_pe);
      args.k_pe = {k_pe_.const_data_ptr(), k_pe_.stride(0), 0};
    }
    args.dtype = q.scalar_type();
    args.q = heads(q_);
    args.k = heads(k_);
    args.v = heads(v_);
    args.num_heads = q.size(1);
    args.num_kv_heads = k.size(1);
    args.width = q.size(2);
    args.value_width = v.size(2);
    args.interleaved = interleaved;
    args.scale = scale;
    args.window = window.value_or(kNoWindow);
    args.soft_cap = soft_cap.value_or(0);
    set_sequences();
    args.taken = &taken_;
  }

  void run(void (*kernel)(const AttentionArgs&, int64_t, int64_t)) {
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

 private:
  static Heads heads(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

  // The longest first, so that no thread begins with it when all others are done.
  void set_sequences() {
    const int32_t* ends = cu_seqlens_.const_data_ptr<int32_t>();
    const int64_t count = cu_seqlens_.size(0) - 1, num_tokens = q_.size(0);
    TORCH_CHECK_VALUE(
        count >= 0 && ends[0] == 0 && ends[count] == num_tokens && std::is_sorted(ends, ends + count + 1),
        "packed_attention: got cu_seqlens of shape ", cu_seqlens_.sizes(), ", expected [N+1] rising from 0 to ",
        num_tokens);
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [ends](int32_t a, int32_t b) {
      return ends[a + 1] - ends[a] > ends[b + 1] - ends[b];
    });
    args.cu_seqlens = ends;
    args.order = order_.data();
    args.num_sequences = count;
  }

  at::Tensor q_, k_, v_, k_pe_, cos_, sin_, cu_seqlens_;
  std::vector<int32_t> order_;
  std::atomic<int64_t> taken_{0};
};

std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens,
    const OptionalTensor& k_pe, const OptionalTensor& cos, const OptionalTensor& sin, double scale,
    bool interleaved, std::optional<int64_t> window, std::optional<double> soft_cap) {
  Call call(q, k, v, k_pe, cos, sin, cu_seqlens, scale, interleaved, window, soft_cap);
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(computed_in(q.scalar_type())));
  call.args.out = out.mutable_data_ptr();
  call.args.lse = lse.mutable_data_ptr();
  call.run(R1FAST_PICK(attention_forward));
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& cu_seqlens, const OptionalTensor& k_pe, const OptionalTensor& cos, const OptionalTensor& sin,
    const at::Tensor& out, const at::Tensor& lse, double scale, bool interleaved, std::optional<int64_t> window,
    std::optional<double> soft_cap) {
  Call call(q, k, v, k_pe, cos, sin, cu_seqlens, scale, interleaved, window, soft_cap);
  const at::Tensor grad = grad_out.contiguous();
  at::Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
  at::Tensor grad_v = at::empty(v.sizes(), v.options());
  at::Tensor grad_k_pe = at::empty({0, 0}, q.options()), parts;
  call.args.grad_out = grad.const_data_ptr();
  call.args.out = const_cast<void*>(out.const_data_ptr());  // only read
  call.args.lse = const_cast<void*>(lse.const_data_ptr());
  call.args.grad_q = grad_q.mutable_data_ptr();
  call.args.grad_k = grad_k.mutable_data_ptr();
  call.args.grad_v = grad_v.mutable_data_ptr();
  const int64_t rotary_width = call.args.rotary_width;
  if (k_pe) {
    parts = at::empty({q.size(0), k.size(1), rotary_width}, q.options().dtype(computed_in(q.scalar_type())));
    grad_k_pe = at::empty(k_pe->sizes(), q.options());
    call.args.k_pe_parts = parts.mutable_data_ptr();
    call.args.grad_k_pe = grad_k_pe.mutable_data_ptr();
  }
  call.run(R1FAST_PICK(attention_backward));
  if (k_pe) {
    run_rows(R1FAST_PICK(attention_shared_gradient), call.args, q.size(0), k.size(1) * rotary_width);
  }
  return {grad_q, grad_k, grad_v, grad_k_pe};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("packed_attention", &packed_attention);
  m.impl("packed_attention_backward", &packed_attention_backward);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
