// Attention of one new token per row over keys and values in the blocks of a cache (cpu/decode_attention.cpp, and inside
// cpu/decode_layers.cpp).
//
// A task is a row, or some key heads of one, with all query heads that read them, in strips of 8. Keys of a block are
// turned in registers, so that 16 of them are a vector; values are read where they lie. All heads read a block before the
// next one is touched. A row is taken in one order, in spans of 256 tokens, whatever else is in the batch.
#pragma once

#include "attention.h"

#include <c10/macros/Macros.h>

#include <vector>

namespace r1fast {

constexpr int64_t kCacheBlock = 16;  // decode_attention_triton.py: BLOCK

struct DecodeArgs {
  at::ScalarType dtype;
  const void *q, *k, *v;  // channels contiguous
  int64_t q_row, q_head, k_slot, k_head, v_slot, v_head;  // strides
  const int32_t* block_table;  // [B, table_width]
  const int32_t* lengths;
  int64_t table_width, num_heads, num_kv_heads, width, value_width;
  int64_t tasks_per_row;  // divides the key heads
  double scale;
  void* out;  // [B, H, e]
  int64_t window = kNoWindow;  // tokens at the end of a row that are seen
  double soft_cap = 0;         // on scaled scores; 0: none
};

namespace {

constexpr int64_t kSpan = 256;

template <typename T>
class DecodeWorker {
  using acc = acc_t<T>;

 public:
  explicit DecodeWorker(const DecodeArgs& args)
      : args_(args), columns_(padded(args.width)), value_columns_(padded(args.value_width)),
        rows_(new acc[kCacheBlock * columns_]), turned_(new acc[kCacheBlock * columns_]),
        values_(new acc[kCacheBlock * value_columns_]) {
    const int64_t group = args.num_heads / args.num_kv_heads;
    for (int64_t head = 0; head < args.num_heads; head += group) {
      for (int64_t i = 0; i < group; i += kStrip) {
        strips_.push_back({head / group, head + i, std::min(kStrip, group - i), {args.scale, args.soft_cap, args.value_width}});
      }
    }
    queries_.reset(new acc[strips_.size() * kStrip * columns_]());
    scores_.reset(new acc[strips_.size() * kStrip * kSpan]);
    std::fill_n(rows_.get(), kCacheBlock * columns_, acc(0));
    std::fill_n(values_.get(), kCacheBlock * value_columns_, acc(0));
  }

  void tasks(int64_t begin, int64_t end) {
    const int64_t size = static_cast<int64_t>(strips_.size()) / args_.tasks_per_row;
    end_row_ = (end - 1) / args_.tasks_per_row + 1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % args_.tasks_per_row;
      attend(task / args_.tasks_per_row, part * size, (part + 1) * size);
    }
  }

 private:
  struct Strip {
    int64_t kv_head, head, heads;
    StripSoftmax<acc> softmax;
  };

  void attend(int64_t row, int64_t first, int64_t last) {
    const int64_t before = first_token(row), hidden = before % kCacheBlock, start = before - hidden;
    const int32_t* blocks = args_.block_table + row * args_.table_width + start / kCacheBlock;
    const int64_t length = args_.lengths[row] - start;
    for (int64_t s = first; s < last; ++s) {
      for (int64_t i = 0; i < strips_[s].heads; ++i) {
        const T* q = static_cast<const T*>(args_.q) + row * args_.q_row + (strips_[s].head + i) * args_.q_head;
        widen(queries(s) + i * columns_, q, args_.width);
      }
      strips_[s].softmax.start();
    }
    const int64_t next = row + 1 < end_row_ ? first_token(row + 1) : 0;
    for (int64_t begin = 0; begin < length; begin += kSpan) {
      const int64_t tokens = std::min(kSpan, length - begin);
      const int32_t* span = blocks + begin / kCacheBlock;
      for (int64_t j = 0; j < tokens; j += kCacheBlock) {
        prefetch(args_.v == args_.k ? nullptr : args_.v, args_.v_slot, row, start + begin + j);
        const acc* turned = nullptr;
        for (int64_t s = first; s < last; ++s) {
          if (s == first || strips_[s].kv_head != strips_[s - 1].kv_head) {
            turned = keys(span[j / kCacheBlock], strips_[s].kv_head);
          }
          product<acc>(scores(s) + j, kSpan, {queries(s), columns_, 1}, {turned, kCacheBlock}, args_.width, kCacheBlock,
                       false, strips_[s].heads);
        }
      }
      for (int64_t s = first; s < last; ++s) {
        for (int64_t i = 0; i < strips_[s].heads; ++i) {
          strips_[s].softmax.fold(i, scores(s) + i * kSpan, begin == 0 ? hidden : 0, tokens, padded(tokens),
                                   begin > 0);
        }
      }
      for (int64_t j = 0; j < tokens; j += kCacheBlock) {
        const bool goes_on = begin + kSpan + j < length;
        prefetch(args_.k, args_.k_slot, goes_on ? row : row + 1, goes_on ? start + begin + kSpan + j : next + j);
        // Slots behind the length may hold anything, and 0 times NaN is not 0.
        const int64_t steps = std::min(kCacheBlock, tokens - j);
        Right<acc> right{};
        for (int64_t s = first; s < last; ++s) {
          if (s == first || strips_[s].kv_head != strips_[s - 1].kv_head) {
            right = values(span[j / kCacheBlock], strips_[s].kv_head, steps);
          }
          product<acc>(strips_[s].softmax.sums(), value_columns_, {scores(s) + j, kSpan, 1}, right, steps,
                       value_columns_, begin + j > 0, strips_[s].heads);
        }
      }
    }
    for (int64_t s = first; s < last; ++s) {
      T* out = static_cast<T*>(args_.out) + (row * args_.num_heads + strips_[s].head) * args_.value_width;
      for (int64_t i = 0; i < strips_[s].heads; ++i) {
        narrow(out + i * args_.value_width, strips_[s].softmax.finish(i), args_.value_width);
      }
    }
  }

  int64_t first_token(int64_t row) const { return std::max<int64_t>(0, args_.lengths[row] - args_.window); }

  // While keys of a span are multiplied its values are fetched, while values are the next keys: blocks lie anywhere, and
  // no processor guesses where. To the second level, the first is too small (and was slower). Of all heads. Not inlined,
  // it would count as a function without effect, and GCC would drop its calls.
  C10_ALWAYS_INLINE void prefetch(const void* data, int64_t slot_stride, int64_t row, int64_t token) const {
    if (data == nullptr || row >= end_row_ || token >= args_.lengths[row]) {
      return;
    }
    const int64_t block = args_.block_table[row * args_.table_width + token / kCacheBlock];
    const T* first = static_cast<const T*>(data) + block * kCacheBlock * slot_stride;
    for (int64_t i = 0; i < kCacheBlock * slot_stride; i += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(first + i, /*write=*/0, /*locality=*/2);
    }
  }

  acc* queries(int64_t strip) const { return queries_.get() + strip * kStrip * columns_; }
  acc* scores(int64_t strip) const { return scores_.get() + strip * kStrip * kSpan; }

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
    if (std::is_same_v<T, acc> && value_columns_ == args_.value_width) {
      return {reinterpret_cast<const acc*>(v), args_.v_slot};
    }
    for (int64_t j = 0; j < count; ++j) {
      widen(values_.get() + j * value_columns_, v + j * args_.v_slot, args_.value_width);
    }
    return {values_.get(), value_columns_};
  }

  const DecodeArgs& args_;
  const int64_t columns_, value_columns_;
  int64_t end_row_ = 0;
  std::vector<Strip> strips_;
  std::unique_ptr<acc[]> queries_, scores_, rows_, turned_, values_;
};

}  // namespace

}  // namespace r1fast
