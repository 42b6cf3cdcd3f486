// What both passes of packed_attention share (cpu/packed_attention.cpp): the arguments of a call, how rows of a head are
// rotated and laid out for products, and the task that a thread is at.
#pragma once

#include "attention.h"

#include <atomic>

namespace r1fast {

// Rows of a tensor [tokens, heads, channels], channels contiguous.
struct Heads {
  const void* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
};

struct AttentionArgs {
  at::ScalarType dtype;
  Heads q, k, v;
  Heads k_pe;      // rotated channels that all key heads share; null: they are the last ones of k
  const void *cos, *sin;  // [T, R / 2]
  const int32_t* cu_seqlens;
  const int32_t* order;  // of sequences, from long to short
  int64_t num_sequences, num_heads, num_kv_heads;
  int64_t width, value_width, rotary_width;  // d, e, R
  bool interleaved;
  double scale, soft_cap;  // 0: none
  int64_t window;  // query i sees keys i - window + 1 to i
  std::atomic<int64_t>* taken;  // tasks
  void* out;                    // [T, H, e]
  void* lse;                    // acc [T, H], of scaled and capped scores
  // Backward only.
  const void* grad_out;               // [T, H, e]
  void *grad_q, *grad_k, *grad_v;     // [T, H, d], [T, K, d or d - R], [T, K, e]
  void* k_pe_parts;                   // acc [T, K, R], not yet rotated back; null where k_pe is
  void* grad_k_pe;                    // [T, R]
};

namespace {

// Pair i of x is turned by the angle of `cos` and `sin`; its halves come out apart.
template <typename T>
inline void rotate(acc_t<T>* out, const T* x, const T* cos, const T* sin, int64_t half, bool interleaved) {
  using acc = acc_t<T>;
  const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const acc a = x[i * step], b = x[i * step + second], c = cos[i], s = sin[i];
    out[i] = a * c - b * s;
    out[i + half] = b * c + a * s;
  }
}

// The transpose of `rotate`, on gradients.
template <typename T>
inline void rotate_back(acc_t<T>* out, const acc_t<T>* grad, const T* cos, const T* sin, int64_t half,
                        bool interleaved) {
  using acc = acc_t<T>;
  const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const acc a = grad[i], b = grad[i + half], c = cos[i], s = sin[i];
    out[i * step] = a * c + b * s;
    out[i * step + second] = b * c - a * s;
  }
}

// Rows of one head in units, row-major, rows and columns padded with zeros; what B of a product is made of.
template <typename T, typename Unit>
struct Rows {
  int64_t columns = 0, row = 0;  // padded channels; units of a row
  Unit* data = nullptr;
  Scratch<Unit> memory, summed, turned;

  // The width is the same in all calls, so that columns of padding stay zero.
  void resize(int64_t num_rows, int64_t width) {
    columns = padded(width);
    row = padded((width + kValues<Unit> - 1) / kValues<Unit>);
    const int64_t size = padded(num_rows) * row;
    if (memory.grows(size)) {
      std::memset(memory.get(size), 0, size * sizeof(Unit));
    }
    data = memory.get(size);
  }

  using Value = std::conditional_t<kValues<Unit> == 2, T, Unit>;
  Value* at(int64_t i) const { return reinterpret_cast<Value*>(data + i * row); }

  void clear(int64_t begin, int64_t end) { std::memset(data + begin * row, 0, (end - begin) * row * sizeof(Unit)); }

  Left<Unit> strip(int64_t i) const { return {data + i * row, row, 1}; }

  // B of products that sum over channels, one column per row: [steps, num_rows].
  Right<Unit> over_channels(int64_t num_rows) {
    const int64_t size = padded(num_rows);
    Unit* out = turned.get(row * size);
    transpose(out, size, data, row, size, row);
    return {out, size};
  }

  // B of products that sum over rows: [rows / values, columns].
  Right<Unit> over_rows(int64_t num_rows) {
#ifdef R1FAST_HAS_BF16_PAIRS
    if constexpr (kValues<Unit> == 2) {
      const int64_t size = padded(num_rows);
      Unit* out = summed.get(size / 2 * columns);
      for (int64_t i = 0; i < size; i += 2) {
        const auto *a = reinterpret_cast<const uint16_t*>(data + i * row),
                   *b = reinterpret_cast<const uint16_t*>(data + (i + 1) * row);
        Unit* pairs = out + i / 2 * columns;
        for (int64_t j = 0; j < columns; ++j) {
          pairs[j].bits = a[j] | static_cast<uint32_t>(b[j]) << 16;
        }
      }
      return {out, columns};
    }
#endif
    return {data, row};
  }
};

template <typename T, typename Unit>
class Task {
 public:
  using acc = acc_t<T>;

 protected:
  explicit Task(const AttentionArgs& args)
      : args_(args), half_(args.rotary_width / 2), plain_(args.width - args.rotary_width),
        group_(args.num_heads / args.num_kv_heads), scratch_(new acc[2 * (args.width + args.value_width)]) {}

  // False when no task is left.
  bool next() {
    const int64_t task = args_.taken->fetch_add(1);
    if (task >= args_.num_sequences * args_.num_kv_heads) {
      return false;
    }
    const int64_t sequence = args_.order[task / args_.num_kv_heads];
    kv_head_ = task % args_.num_kv_heads;
    first_ = args_.cu_seqlens[sequence];
    length_ = args_.cu_seqlens[sequence + 1] - first_;
    return true;
  }

  static const T* at(const Heads& heads, int64_t token, int64_t head) {
    return static_cast<const T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
  }

  // The channels of a row, the last R of them rotated.
  template <typename Value>
  void read_rotated(Value* out, const T* plain, const T* rotary, int64_t token) const {
    copy(out, plain, plain_);
    if (half_ == 0) {
      return;
    }
    if constexpr (std::is_same_v<Value, acc>) {
      rotate(out + plain_, rotary, cos(token), sin(token), half_, args_.interleaved);
    } else {
      rotate(scratch_.get(), rotary, cos(token), sin(token), half_, args_.interleaved);
      narrow(out + plain_, scratch_.get(), 2 * half_);
    }
  }

  template <typename Value>
  static void copy(Value* out, const T* x, int64_t size) {
    if constexpr (std::is_same_v<Value, T>) {
      std::copy_n(x, size, out);
    } else {
      widen(out, x, size);
    }
  }

  void read_queries(Rows<T, Unit>& rows, int64_t head, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const T* q = at(args_.q, first_ + i, head);
      read_rotated(rows.at(i - begin), q, q + plain_, first_ + i);
    }
    rows.clear(end - begin, padded(end - begin));
  }

  void read_keys(Rows<T, Unit>& rows) const {
    rows.resize(length_, args_.width);
    for (int64_t i = 0; i < length_; ++i) {
      const T* k = at(args_.k, first_ + i, kv_head_);
      const T* pe = args_.k_pe.data == nullptr ? k + plain_ : at(args_.k_pe, first_ + i, 0);
      read_rotated(rows.at(i), k, pe, first_ + i);
    }
    rows.clear(length_, padded(length_));
  }

  void read_values(Rows<T, Unit>& rows, const Heads& heads, int64_t head) const {
    rows.resize(length_, args_.value_width);
    for (int64_t i = 0; i < length_; ++i) {
      copy(rows.at(i), at(heads, first_ + i, head), args_.value_width);
    }
    rows.clear(length_, padded(length_));
  }

  const T* cos(int64_t token) const { return static_cast<const T*>(args_.cos) + token * half_; }
  const T* sin(int64_t token) const { return static_cast<const T*>(args_.sin) + token * half_; }

  const AttentionArgs& args_;
  const int64_t half_, plain_, group_;
  int64_t kv_head_ = 0, first_ = 0, length_ = 0;
  std::unique_ptr<acc[]> scratch_;
};

}  // namespace
}  // namespace r1fast
