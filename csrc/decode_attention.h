// Attention of one new token per row over keys and values in the blocks of a cache (cpu/decode_attention.cpp, and inside
// cpu/decode_layers.cpp).
//
// A task is a row and a key head, with all query heads that read it, in strips of 8. Keys of a block are turned in
// registers, so that 16 of them are a vector; values are read where they lie. A row is taken in one order, in spans of
// 256 tokens, whatever else is in the batch.
#pragma once

#include "attention.h"

namespace r1fast {

constexpr int64_t kCacheBlock = 16;  // decode_attention.py: BLOCK

struct DecodeArgs {
  at::ScalarType dtype;
  const void *q, *k, *v;  // channels contiguous
  int64_t q_row, q_head, k_slot, k_head, v_slot, v_head;  // strides
  const int32_t* block_table;  // [B, table_width]
  const int32_t* lengths;
  int64_t table_width, num_heads, num_kv_heads, width, value_width;
  double scale;
  void* out;  // [B, H, e]
};

namespace {
inline namespace CPU_CAPABILITY {

constexpr int64_t kSpan = 256;

template <typename T>
class DecodeWorker {
  using acc = acc_t<T>;

 public:
  explicit DecodeWorker(const DecodeArgs& args)
      : args_(args), columns_(padded(args.width)), softmax_(args.scale, args.value_width),
        queries_(new acc[kStrip * columns_]), scores_(new acc[kStrip * kSpan]), rows_(new acc[kCacheBlock * columns_]),
        turned_(new acc[kCacheBlock * columns_]), values_(new acc[kCacheBlock * softmax_.columns]) {
    std::fill_n(queries_.get(), kStrip * columns_, acc(0));
    std::fill_n(rows_.get(), kCacheBlock * columns_, acc(0));
    std::fill_n(values_.get(), kCacheBlock * softmax_.columns, acc(0));
  }

  void tasks(int64_t begin, int64_t end) {
    const int64_t group = args_.num_heads / args_.num_kv_heads;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / args_.num_kv_heads, kv_head = task % args_.num_kv_heads;
      for (int64_t first = 0; first < group; first += kStrip) {
        strip(row, kv_head, kv_head * group + first, std::min(kStrip, group - first));
      }
    }
  }

 private:
  void strip(int64_t row, int64_t kv_head, int64_t head, int64_t heads) {
    const int32_t* blocks = args_.block_table + row * args_.table_width;
    const int64_t length = args_.lengths[row];
    for (int64_t i = 0; i < heads; ++i) {
      const T* q = static_cast<const T*>(args_.q) + row * args_.q_row + (head + i) * args_.q_head;
      widen(queries_.get() + i * columns_, q, args_.width);
    }
    softmax_.start();
    for (int64_t begin = 0; begin < length; begin += kSpan) {
      const int64_t tokens = std::min(kSpan, length - begin), size = padded(tokens);
      const int32_t* span = blocks + begin / kCacheBlock;
      for (int64_t j = 0; j < tokens; j += kCacheBlock) {
        product<acc>(
            scores_.get() + j, kSpan, {queries_.get(), columns_, 1}, {keys(span[j / kCacheBlock], kv_head), kCacheBlock},
            args_.width, kCacheBlock, false, heads);
      }
      for (int64_t i = 0; i < heads; ++i) {
        softmax_.fold(i, scores_.get() + i * kSpan, tokens, size, begin > 0);
      }
      for (int64_t j = 0; j < tokens; j += kCacheBlock) {
        // Slots behind the length may hold anything, and 0 times NaN is not 0.
        const int64_t steps = std::min(kCacheBlock, tokens - j);
        product<acc>(
            softmax_.sums(), softmax_.columns, {scores_.get() + j, kSpan, 1},
            values(span[j / kCacheBlock], kv_head, steps), steps, softmax_.columns, begin + j > 0,
            heads);
      }
    }
    for (int64_t i = 0; i < heads; ++i) {
      T* out = static_cast<T*>(args_.out) + (row * args_.num_heads + head + i) * args_.value_width;
      narrow(out, softmax_.finish(i), args_.value_width);
    }
  }

  // [channels, 16] of a block; of its unused slots anything.
  const acc* keys(int64_t block, int64_t kv_head) {
    const T* k = static_cast<const T*>(args_.k) + block * kCacheBlock * args_.k_slot + kv_head * args_.k_head;
    const acc* rows = rows_.get();
    int64_t stride = columns_;
    if (std::is_same_v<T, acc> && columns_ == args_.width) {
      rows = reinterpret_cast<const acc*>(k);
      stride = args_.k_slot;
    } else {
      for (int64_t j = 0; j < kCacheBlock; ++j) {
        widen(rows_.get() + j * columns_, k + j * args_.k_slot, args_.width);
      }
    }
    transpose(turned_.get(), kCacheBlock, rows, stride, kCacheBlock, columns_);
    return turned_.get();
  }

  Right<acc> values(int64_t block, int64_t kv_head, int64_t count) {
    const T* v = static_cast<const T*>(args_.v) + block * kCacheBlock * args_.v_slot + kv_head * args_.v_head;
    if (std::is_same_v<T, acc> && softmax_.columns == args_.value_width) {
      return {reinterpret_cast<const acc*>(v), args_.v_slot};
    }
    for (int64_t j = 0; j < count; ++j) {
      widen(values_.get() + j * softmax_.columns, v + j * args_.v_slot, args_.value_width);
    }
    return {values_.get(), softmax_.columns};
  }

  const DecodeArgs& args_;
  const int64_t columns_;
  StripSoftmax<acc> softmax_;
  std::unique_ptr<acc[]> queries_, scores_, rows_, turned_, values_;
};

}  // namespace CPU_CAPABILITY
}  // namespace

}  // namespace r1fast
