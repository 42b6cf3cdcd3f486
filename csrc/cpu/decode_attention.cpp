// Attention of one new token per row over keys and values in the blocks of a cache: decode_attention.h for all tasks.
#include "../decode_attention.h"
#include "../operator.h"

namespace r1fast {

// Tasks begin..end.
R1FAST_KERNEL(decode_attention_rows, DecodeArgs) {
  by_dtype(args.dtype, [&]<typename T>() { DecodeWorker<T>(args).tasks(begin, end); });
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

at::Tensor decode_attention(
    const at::Tensor& q_BHd, const at::Tensor& k_SKd, const at::Tensor& v_SKe, const at::Tensor& block_table_BN,
    const at::Tensor& lengths_B, double scale, std::optional<int64_t> window,
    std::optional<double> soft_cap) {
  check_floats("decode_attention", {q_BHd, k_SKd, v_SKe});
  check_tensor("decode_attention", "block_table_BN", block_table_BN, at::kInt, {q_BHd.size(0), -1});
  check_tensor("decode_attention", "lengths_B", lengths_B, at::kInt, {q_BHd.size(0)});
  const at::Tensor q = with_unit_columns(q_BHd), k = with_unit_columns(k_SKd), v = with_unit_columns(v_SKe);
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
  // Few rows: each head by itself, for all threads to have something.
  const int64_t tasks_per_row = num_rows < at::get_num_threads() ? k.size(1) : 1;
  const DecodeArgs args{
      q.scalar_type(), q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), q.stride(0), q.stride(1), k.stride(0),
      k.stride(1), v.stride(0), v.stride(1), blocks, tokens, table_width, q.size(1), k.size(1), q.size(2), v.size(2),
      tasks_per_row, scale, out.mutable_data_ptr(), window.value_or(kNoWindow), soft_cap.value_or(0)};
  const int64_t elements = longest * k.size(1) / tasks_per_row * (q.size(2) + v.size(2));
  run_rows(R1FAST_PICK(decode_attention_rows), args, num_rows * tasks_per_row, elements);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("decode_attention", &decode_attention);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
