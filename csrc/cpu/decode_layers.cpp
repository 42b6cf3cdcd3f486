// The operator of decode_layers.h: which weights a layer has, where rows are in the cache, and how threads share them.
#include "../decode_layers.h"
#include "../operator.h"

#include <atomic>
#include <thread>

namespace r1fast {

R1FAST_KERNEL(decode_layers_chunks, LayersArgs) {
#ifdef R1FAST_HAS_BF16_PAIRS
  if (args.dtype == at::kBFloat16 && cpu_multiplies_bf16()) {
    return run_chunks<at::BFloat16, BF16Pair>(args, begin, end);
  }
#endif
  args.dtype == at::kBFloat16 ? run_chunks<at::BFloat16, float>(args, begin, end)
                              : run_chunks<float, float>(args, begin, end);
}

#ifdef R1FAST_BUILD_OPERATOR
namespace {

using Weights = c10::List<std::optional<at::Tensor>>;

LayerArgs read_layer(const Weights& weights, int64_t layer, at::ScalarType dtype) {
  LayerArgs args{};
  for (int64_t name = 0; name < kNumNames; ++name) {
    const std::optional<at::Tensor> weight = weights.get(layer * kNumNames + name);
    if (weight) {
      const auto expected = name == kRouterBias ? at::kFloat : dtype;
      TORCH_CHECK_VALUE(
          weight->is_contiguous() && weight->scalar_type() == expected, "decode_layers: weight ", name, " of layer ",
          layer, " is ", weight->sizes(), " in ", weight->scalar_type(), ", expected contiguous memory in ", expected);
      const bool is_matrix = weight->dim() > 1;
      args.weights[name] = {
          weight->const_data_ptr(), is_matrix ? weight->size(-2) : 0, is_matrix ? weight->size(-1) : 0};
    }
  }
  return args;
}

int64_t bytes_of(const Weights& weights) {
  int64_t bytes = 0;
  for (const std::optional<at::Tensor>& weight : weights) {
    bytes += weight ? static_cast<int64_t>(weight->nbytes()) : 0;
  }
  return bytes;
}

// Where the rows are in their sequences and in the cache, and which rows a thread takes together.
struct Places {
  std::vector<int64_t> positions, slots, chunk_rows;
  std::vector<int32_t> lengths, block_table;
  int64_t table_width = 0;

  void add(int64_t position, int64_t slot) {
    positions.push_back(position);
    slots.push_back(slot);
    lengths.push_back(static_cast<int32_t>(position + 1));
  }
};

// Bytes of all weights. Those of a small model stay in a cache of all cores, and nobody waits where each thread takes its
// rows alone. Larger ones come from memory, and each should come once: threads then share every product.
constexpr int64_t kMostPrivateBytes = 32 << 20;

// One region of threads for a whole step. A thread that does not run just now, because the machine has other work, is
// not waited for, unless it holds a task: regions of their own for each product would all end with the last to come.
class StepTeam : public Team {
 public:
  // `lead` on this thread, its tasks on all.
  template <typename F>
  void step(int64_t threads, const F& lead) {
    at::parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
      if (worker == 0) {
        const Ending ending{next_};
        lead();
      } else {
        for (int64_t idle = 0; next_.load(std::memory_order_acquire) != kEnd;) {
          idle = work(worker) ? 0 : idle + 1;
          pause(idle);
        }
      }
    });
  }

  void run(Task task, const void* context, int64_t count) override {
    next_.store(kNone);  // before what it says how to read
    task_.store(task, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    next_.store(++job_ << 32, std::memory_order_release);
    while (work(0)) {
    }
    for (int64_t idle = 0; done_.load(std::memory_order_acquire) < count; ++idle) {
      pause(idle);
    }
  }

 private:
  static constexpr uint64_t kNone = 0xffffffff, kEnd = ~uint64_t{0};

  struct Ending {
    std::atomic<uint64_t>& next;
    ~Ending() { next.store(kEnd); }
  };

  bool work(int64_t worker) {
    uint64_t next = next_.load(std::memory_order_acquire);
    const Task task = task_.load(std::memory_order_acquire);
    const void* context = context_.load(std::memory_order_acquire);
    const int64_t index = static_cast<int64_t>(next & kNone);
    if (index >= count_.load(std::memory_order_acquire) ||
        !next_.compare_exchange_strong(next, next + 1, std::memory_order_acq_rel)) {
      return index < count_.load(std::memory_order_relaxed) && worker == 0;  // another took it: the next one
    }
    task(context, index, worker);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  static void pause(int64_t idle) {
    if (idle > 1000) {
      std::this_thread::yield();
    }
#ifdef R1FAST_BUILD_X86
    __builtin_ia32_pause();
#endif
  }

  uint64_t job_ = 0;
  std::atomic<uint64_t> next_{kNone};  // the job, and the next of its tasks
  std::atomic<Task> task_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0}, done_{0};
};

// Their activations stay in the cache of a core. Of prompts more: the last panel of a chunk is half empty.
constexpr int64_t kMostRows = 128, kMostPromptRows = 160;

int64_t rows_per_chunk(int64_t num_rows, int64_t most, int64_t threads) {
  const int64_t chunks = std::max(threads, (num_rows + most - 1) / most);
  return padded((num_rows + chunks - 1) / chunks);
}

void check_block(const char* name, int64_t row, int64_t n, int64_t block, int64_t num_blocks) {
  TORCH_CHECK_VALUE(
      block >= 0 && block < num_blocks, "decode_layers: got ", name, "[", row, ", ", n, "] = ", block,
      ", expected a block of the cache, 0 to ", num_blocks - 1);
}

// Each row at the end of a sequence of its own.
Places decode_places(
    const at::Tensor& positions_B, const at::Tensor& block_table_BN, int64_t num_blocks, int64_t threads) {
  check_tensor("decode_layers", "positions_B", positions_B, at::kLong, {-1});
  check_tensor("decode_layers", "block_table_BN", block_table_BN, at::kInt, {positions_B.size(0), -1});
  const at::Tensor positions = positions_B.contiguous(), table = block_table_BN.contiguous();
  const int64_t num_rows = positions.size(0), width = table.size(1);
  const int32_t* blocks = table.const_data_ptr<int32_t>();
  Places places;
  places.table_width = width;
  places.block_table.assign(blocks, blocks + num_rows * width);
  for (int64_t b = 0; b < num_rows; ++b) {
    const int64_t position = positions.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_VALUE(
        position >= 0 && position < width * kCacheBlock, "decode_layers: got positions_B[", b, "] = ", position,
        ", expected 0 to ", width * kCacheBlock - 1, ", what ", width, " blocks hold");
    for (int64_t n = 0; n <= position / kCacheBlock; ++n) {
      check_block("block_table_BN", b, n, blocks[b * width + n], num_blocks);
    }
    const int64_t block = blocks[b * width + position / kCacheBlock];
    places.add(position, block * kCacheBlock + position % kCacheBlock);
  }
  for (int64_t row = 0; row < num_rows; row += rows_per_chunk(num_rows, kMostRows, threads)) {
    places.chunk_rows.push_back(row);
  }
  places.chunk_rows.push_back(num_rows);
  return places;
}

// Whole sequences: token p of one is in slot p % 16 of its block p / 16.
Places prefill_places(
    const at::Tensor& cu_seqlens, const at::Tensor& slots_T, int64_t num_blocks, int64_t threads) {
  check_tensor("decode_layers", "cu_seqlens", cu_seqlens, at::kInt, {-1});
  check_tensor("decode_layers", "slots_T", slots_T, at::kLong, {-1});
  const at::Tensor ends = cu_seqlens.contiguous(), slots = slots_T.contiguous();
  const int32_t* end = ends.const_data_ptr<int32_t>();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t num_sequences = ends.numel() - 1, num_rows = slots.numel();
  Places places;
  for (int64_t n = 0; n < num_sequences; ++n) {
    places.table_width = std::max(places.table_width, (end[n + 1] - end[n] + kCacheBlock - 1) / kCacheBlock);
  }
  places.block_table.assign(num_rows * places.table_width, 0);
  for (int64_t n = 0; n < num_sequences; ++n) {
    for (int64_t row = end[n]; row < end[n + 1]; ++row) {
      const int64_t position = row - end[n];
      check_block("slots_T / 16", n, position, slot[row] / kCacheBlock, num_blocks);
      TORCH_CHECK_VALUE(
          slot[row] % kCacheBlock == position % kCacheBlock, "decode_layers: got slots_T[", row, "] = ", slot[row],
          " for position ", position, ", expected the same place in a block of ", kCacheBlock);
      for (int64_t i = 0; i <= position / kCacheBlock; ++i) {
        places.block_table[row * places.table_width + i] =
            static_cast<int32_t>(slot[end[n] + i * kCacheBlock] / kCacheBlock);
      }
      places.add(position, slot[row]);
    }
  }
  places.chunk_rows.push_back(0);
  for (int64_t n = 0; n < num_sequences; ++n) {
    const int64_t first = places.chunk_rows.back();
    if (end[n] > first && end[n + 1] - first > rows_per_chunk(num_rows, kMostPromptRows, threads)) {
      places.chunk_rows.push_back(end[n]);
    }
  }
  places.chunk_rows.push_back(num_rows);
  return places;
}

// places: (positions_B, block_table_BN) of a decode step, (cu_seqlens, slots_T) of a prefill, which returns what the head
// would read.
std::tuple<at::Tensor, at::Tensor> decode_layers(
    const at::Tensor& input_ids, const at::Tensor& first_of_places, const at::Tensor& second_of_places, bool prefills,
    const std::vector<at::Tensor>& cache, const at::Tensor& embedding_VD, const Weights& weights,
    const at::Tensor& norm_D, const at::Tensor& head_VD, const at::Tensor& inv_freq_R, double rotary_scale,
    bool interleaved, int64_t num_heads, double scale, double eps, double latent_eps, int64_t top_k, int64_t n_group,
    int64_t topk_group, bool norm_topk_prob, double routed_scaling_factor) {
  const at::Tensor& keys = cache[0];
  const int64_t threads = std::max(at::get_num_threads(), 1);
  const bool shares = threads > 1 && bytes_of(weights) + static_cast<int64_t>(head_VD.nbytes()) > kMostPrivateBytes;
  const Places places = (prefills ? prefill_places : decode_places)(
      first_of_places, second_of_places, keys.size(0) / kCacheBlock, shares ? 1 : threads);
  const auto dtype = embedding_VD.scalar_type();
  const int64_t num_rows = input_ids.size(0), width = embedding_VD.size(1);
  TORCH_CHECK_VALUE(
      dtype == at::kFloat || dtype == at::kBFloat16, "decode_layers: got an embedding in ", dtype,
      ", expected float32 or bfloat16");
  check_tensor("decode_layers", "norm_D", norm_D, dtype, {width});
  check_tensor("decode_layers", "head_VD", head_VD, dtype, {-1, width});
  check_tensor("decode_layers", "inv_freq_R", inv_freq_R, at::kFloat, {-1});
  check_tensor("decode_layers", "input_ids", input_ids, at::kLong, {static_cast<int64_t>(places.slots.size())});
  const at::Tensor ids = input_ids.contiguous(), embedding = embedding_VD.contiguous();
  for (int64_t b = 0; b < num_rows; ++b) {
    const int64_t id = ids.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_VALUE(
        id >= 0 && id < embedding.size(0), "decode_layers: got the id ", id, " in row ", b, ", expected 0 to ",
        embedding.size(0) - 1);
  }
  for (const at::Tensor& buffer : cache) {
    TORCH_CHECK_VALUE(
        buffer.scalar_type() == dtype && buffer.is_contiguous() && buffer.sizes()[0] == keys.size(0),
        "decode_layers: got a cache ", buffer.sizes(), " in ", buffer.scalar_type(), ", expected contiguous [",
        keys.size(0), ", K, d] in ", dtype);
  }
  const at::Tensor norm = norm_D.contiguous(), head = head_VD.contiguous(), frequencies = inv_freq_R.contiguous();
  const int64_t num_layers = static_cast<int64_t>(weights.size()) / kNumNames;
  const int64_t buffers = static_cast<int64_t>(cache.size()) / num_layers;  // of a layer
  int64_t num_moe = 0;
  std::vector<LayerArgs> layers;
  for (int64_t i = 0; i < num_layers; ++i) {
    layers.push_back(read_layer(weights, i, dtype));
    layers.back().keys = cache[i * buffers].mutable_data_ptr();
    layers.back().values = buffers == 2 ? cache[i * buffers + 1].mutable_data_ptr() : nullptr;
    num_moe += layers.back().has(kRouter);
  }
  at::Tensor out = at::empty({num_rows, prefills ? width : head.size(0)}, embedding.options());
  at::Tensor experts = at::empty({num_moe, num_rows, top_k}, ids.options());
  const int64_t value_width = buffers == 2 ? cache[1].size(2) : layers[0][kKvB].inputs;
  StepTeam team;
  const LayersArgs args{
      dtype, layers.data(), num_layers, {norm.const_data_ptr()}, {head.const_data_ptr(), head.size(0), head.size(1)},
      embedding.const_data_ptr(), !prefills,
      out.mutable_data_ptr(), num_rows, width, ids.const_data_ptr<int64_t>(), places.positions.data(),
      frequencies.const_data_ptr<float>(), frequencies.numel(), rotary_scale, interleaved, places.slots.data(),
      places.block_table.data(), places.lengths.data(), places.table_width, num_heads, keys.size(1), keys.size(2),
      value_width, scale, eps, latent_eps, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor,
      experts.mutable_data_ptr<int64_t>(), places.chunk_rows.data(), shares ? &team : nullptr, shares ? threads : 1};
  const int64_t num_chunks = static_cast<int64_t>(places.chunk_rows.size()) - 1;
  if (shares) {
    team.step(threads, [&] { R1FAST_PICK(decode_layers_chunks)(args, 0, num_chunks); });
  } else {
    at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
      R1FAST_PICK(decode_layers_chunks)(args, begin, end);
    });
  }
  return {out, experts};
}

}  // namespace

TORCH_LIBRARY_IMPL(r1fast, CPU, m) {
  m.impl("decode_layers", &decode_layers);
}
#endif  // R1FAST_BUILD_OPERATOR

}  // namespace r1fast
