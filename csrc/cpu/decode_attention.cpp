// Attention of one new token per row over keys and values in the blocks of a cache.
//
// A task is a row and a key head, with all query heads that read it, in strips of 8. Keys of a block are turned in
// registers, so that 16 of them are a vector; values are read where they lie. A row is taken in one order, in spans of
// 256 tokens, whatever else is in the batch.
#include "../attention.h"

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

  void task(int64_t index) {
    const int64_t row = index / args_.num_kv_heads, kv_head = index % args_.num_kv_heads;
    const int64_t group = args_.num_heads / args_.num_kv_heads;
    for (int64_t first = 0; first < group; first += kStrip) {
      strip(row, kv_head, kv_head * group + first, std::min(kStrip, group - first));
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

// Tasks begin..end: a row and a key head each.
R1FAST_KERNEL(decode_attention_rows, DecodeArgs) {
  by_dtype(args.dtype, [&]<typename T>() {
    DecodeWorker<T> worker(args);
    for (int64_t index = begin; index < end; ++index) {
      worker.task(index);
    }
  });
}

}  // namespace r1fast

#ifdef R1FAST_BUILD_OPERATOR

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace r1fast {
namespace {

at::Tensor unit_channels(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

at::Tensor decode_attention(
    const at::Tensor& q_BHd, const at::Tensor& k_SKd, const at::Tensor& v_SKe, const at::Tensor& block_table_BN,
    const at::Tensor& lengths_B, double scale) {
  const auto dtype = q_BHd.scalar_type();
  TORCH_CHECK_VALUE(
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kDouble) && k_SKd.scalar_type() == dtype &&
          v_SKe.scalar_type() == dtype && block_table_BN.scalar_type() == at::kInt && lengths_B.scalar_type() == at::kInt,
      "decode_attention: got ", dtype, ", ", k_SKd.scalar_type(), ", ", v_SKe.scalar_type(), ", block_table in ",
      block_table_BN.scalar_type(), " and lengths in ", lengths_B.scalar_type(),
      ", expected one of float32, bfloat16 and float64, int32 and int32");
  const at::Tensor q = unit_channels(q_BHd), k = unit_channels(k_SKd), v = unit_channels(v_SKe);
  const at::Tensor block_table = block_table_BN.contiguous(), lengths = lengths_B.contiguous();
  const int32_t *blocks = block_table.const_data_ptr<int32_t>(), *tokens = lengths.const_data_ptr<int32_t>();
  const int64_t num_rows = q.size(0), table_width = block_table.size(1), num_blocks = k.size(0) / kCacheBlock;
  int64_t longest = 1;
  for (int64_t b = 0; b < num_rows; ++b) {
    TORCH_CHECK_VALUE(
        tokens[b] >= 1 && tokens[b] <= table_width * kCacheBlock, "decode_attention: got lengths_B[", b, "] = ",
        tokens[b], ", expected 1 to ", table_width * kCacheBlock, ", what ", table_width, " blocks hold");
    for (int64_t n = 0; n * kCacheBlock < tokens[b]; ++n) {
      const int32_t block = blocks[b * table_width + n];
      TORCH_CHECK_VALUE(
          block >= 0 && block < num_blocks, "decode_attention: got block_table_BN[", b, ", ", n, "] = ", block,
          ", expected a block of the cache, 0 to ", num_blocks - 1);
    }
    longest = std::max<int64_t>(longest, tokens[b]);
  }
  at::Tensor out = at::empty({num_rows, q.size(1), v.size(2)}, q.options());
  const DecodeArgs args{
      dtype, q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), q.stride(0), q.stride(1), k.stride(0),
      k.stride(1), v.stride(0), v.stride(1), blocks, tokens, table_width, q.size(1), k.size(1), q.size(2), v.size(2),
      scale, out.mutable_data_ptr()};
  const int64_t grain = rows_per_task(longest * (q.size(2) + v.size(2)));
  at::parallel_for(0, num_rows * k.size(1), grain, [&](int64_t begin, int64_t end) {
    R1FAST_PICK(decode_attention_rows)(args, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("decode_attention", &decode_attention);
}

}  // namespace r1fast

#endif  // R1FAST_BUILD_OPERATOR
