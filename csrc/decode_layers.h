// A decode step from token ids to logits: one new token in each row, and no wait of threads between the layers. Or short
// prompts: a token in each row, those of a sequence on one thread, which writes all keys of a layer before it reads any.
//
// A thread takes some rows through every layer: what a row computes needs no other row, only the cache. Rows lie side by
// side in panels of 32 (the last one may have 16), so that a vector holds one channel of several rows:
//
//   panel    channel 0 of rows 0..31 | channel 1 of rows 0..31 | ...
//
// Products then read weights where and as they lie in the model, a number at a time against a vector of rows; norms,
// rotations and activations need no sum across a vector; and the bits of a row depend on the row alone. Attention and the
// choice of experts take rows one by one. What is rounded to bf16 is what the layers of a training forward round.
#pragma once

#include "decode_attention.h"
#include "route.h"
#include "row_products.h"

#include <vector>

namespace r1fast {

struct LayersArgs {
  at::ScalarType dtype;
  const LayerArgs* layers;
  int64_t num_layers;
  Weight norm;  // before the head
  Weight head;
  const void* embedding;  // [V, D]
  bool logits;            // else what the head would read
  void* out;              // [B, V or D]
  int64_t num_rows, width;
  const int64_t *ids, *positions;
  const float* frequencies;  // [R / 2]
  int64_t half;              // R / 2
  double rotary_scale;
  bool interleaved;
  const int64_t* slots;
  const int32_t *block_table, *lengths;
  int64_t table_width, num_heads, num_kv_heads, head_width, value_width;  // of what is cached
  double scale, eps, latent_eps;
  int64_t top_k, n_group, topk_group;
  bool norm_topk_prob;
  double routed_scaling_factor;
  int64_t* experts;           // [MoE layers, B, K]
  const int64_t* chunk_rows;  // first row of each chunk, and the end
  Team* team;                 // null: a thread takes its rows through all layers alone
  int64_t workers;
};

namespace {

constexpr int64_t kLogits = 504;  // at a time, whole strips: those of a vocabulary would leave the cache

// Rows of one thread, in bf16 or fp32 (T), multiplied in units of `Unit`.
template <typename T, typename Unit>
class RowsWorker : RowProducts<T, Unit> {
  using Products = RowProducts<T, Unit>;
  using typename Products::V, typename Products::Floats, typename Products::Units;
  using Products::linears, Products::project, Products::round, Products::share, Products::part_of;

 public:
  explicit RowsWorker(const LayersArgs& args)
      : Products(args.team, args.workers), args_(args), wide_(args.workers), logits_(args.workers) {}

  void run(int64_t first, int64_t rows) {
    first_ = first;
    layout_.set(rows);
    x_ = x_memory_.get(layout_, args_.width);
    const T* embedding = static_cast<const T*>(args_.embedding);
    from_rows([&](int64_t row) { return embedding + args_.ids[first + row] * args_.width; }, x_, args_.width, layout_);
    set_angles();
    int64_t moe_layer = 0;
    for (int64_t i = 0; i < args_.num_layers; ++i) {
      const LayerArgs& layer = args_.layers[i];
      normalize(layer[kAttentionNorm]);
      add(layer.has(kK) ? grouped_query_attention(layer) : latent_attention(layer));
      normalize(layer[kMlpNorm]);
      if (!layer.has(kRouter)) {
        add(mlp(layer, kGate, kUp, kDown));
      } else {
        const Floats routed = experts(layer, moe_layer++);
        if (layer.has(kSharedGate)) {
          accumulate(routed, mlp(layer, kSharedGate, kSharedUp, kSharedDown), args_.width);
        }
        add(routed);
      }
    }
    normalize(args_.norm);
    if (args_.logits) {
      write_logits();
    } else {
      T* out = static_cast<T*>(args_.out) + first * args_.width;
      to_rows<T>([&](int64_t row) { return out + row * args_.width; }, normed_, args_.width, layout_);
    }
  }

 private:
  void write_logits() {
    const Weight& head = args_.head;
    T* out = static_cast<T*>(args_.out) + first_ * head.outputs;
    share((head.outputs + kLogits - 1) / kLogits, [&](int64_t task, int64_t worker) {
      const int64_t begin = task * kLogits, count = std::min(kLogits, head.outputs - begin);
      const Weight part{static_cast<const T*>(head.data) + begin * head.inputs, count, head.inputs};
      const Floats logits = logits_[worker].get(layout_, count);
      project(logits, 0, normed_units_, 0, part, layout_, {}, 0, count, worker);
      round(logits, count, layout_);
      to_rows<T>([&](int64_t row) { return out + row * head.outputs + begin; }, logits, count, layout_, worker);
    });
  }

  // ---- attention ----

  Floats grouped_query_attention(const LayerArgs& layer) {
    const int64_t d = args_.head_width, e = args_.value_width, H = args_.num_heads, K = args_.num_kv_heads;
    const Floats q = a_.get(layout_, H * d), k = b_.get(layout_, K * d), v = c_.get(layout_, K * e);
    linears(
        normed_units_,
        {{q, layer[kQ], layer[kQBias]}, {k, layer[kK], layer[kKBias]}, {v, layer[kV], layer[kVBias]}}, layout_);
    turn_heads(q, H, layer[kQHeadNorm]);
    turn_heads(k, K, layer[kKHeadNorm]);
    to_cache(layer.keys, k, K * d);
    to_cache(layer.values, v, K * e);
    const Floats out = attend(layer, q, layer.values);
    return linear(b_, pack(attended_units_, out, H * e, layout_), layer[kO], layer[kOBias]);
  }

  void turn_heads(const Floats& x, int64_t heads, const Weight& norm) {
    const int64_t d = args_.head_width;
    if (norm.data != nullptr) {
      for (int64_t h = 0; h < heads; ++h) {
        this->norm(x, h * d, x, h * d, d, norm, args_.eps);
      }
      round(x, heads * d, layout_);
    }
    for (int64_t h = 0; h < heads; ++h) {
      rotate(x, h * d + d - 2 * args_.half, x, h * d + d - 2 * args_.half);
    }
    round(x, heads * d, layout_);
  }

  // q . (W_UK c) = (W_UK^T q) . c: queries go to the space of the cached latents, and their result back by W_UV.
  Floats latent_attention(const LayerArgs& layer) {
    const int64_t H = args_.num_heads, C = args_.value_width, R = 2 * args_.half, D = args_.head_width;
    const Weight& to_q = layer[layer.has(kQA) ? kQB : kQ];
    const int64_t plain = to_q.outputs / H - R, value = layer[kO].inputs / H, low_width = layer[kQA].outputs;
    Units queried = normed_units_;
    if (layer.has(kQA)) {
      const Floats low = linear(a_, normed_units_, layer[kQA], layer[kQABias]);
      norm(low, 0, low, 0, low_width, layer[kQANorm], args_.latent_eps);
      round(low, low_width, layout_);
      queried = pack(attended_units_, low, low_width, layout_);
    }
    const Floats q = linear(b_, queried, to_q, layer[kQBias]);

    const Floats shared = linear(c_, normed_units_, layer[kKvA], layer[kKvABias]);
    norm(shared, 0, shared, 0, C, layer[kKvANorm], args_.latent_eps);
    rotate(shared, C, shared, C);
    round(shared, D, layout_);
    to_cache(layer.keys, shared, D);

    const Floats absorbed = a_.get(layout_, H * D);
    const Units q_units = pack(attended_units_, q, H * (plain + R), layout_);
    const T* kv_b = static_cast<const T*>(layer[kKvB].data);  // of each head W_UK [plain, C], then W_UV [value, C]
    for (int64_t h = 0; h < H; ++h) {
      project(absorbed, h * D, q_units, h * (plain + R) / kValues<Unit>,
              {turned(kv_b + h * (plain + value) * C, plain, C), C, plain}, layout_);
      rotate(absorbed, h * D + C, q, h * (plain + R) + plain);
    }
    round(absorbed, H * D, layout_);
    const Floats latent = attend(layer, absorbed, layer.keys);
    const Units latent_units = pack(attended_units_, latent, H * C, layout_);
    const Floats out = b_.get(layout_, H * value);
    for (int64_t h = 0; h < H; ++h) {
      project(out, h * value, latent_units, h * C / kValues<Unit>,
              {kv_b + (h * (plain + value) + plain) * C, value, C}, layout_);
    }
    round(out, H * value, layout_);
    return linear(a_, pack(attended_units_, out, H * value, layout_), layer[kO], layer[kOBias]);
  }

  // [H e] of each row, from queries [H d] and the cache.
  Floats attend(const LayerArgs& layer, const Floats& q, const void* values) {
    const int64_t d = args_.head_width, e = args_.value_width, H = args_.num_heads, K = args_.num_kv_heads;
    T *queries = query_rows_.get(layout_.rows * H * d), *out = out_rows_.get(layout_.rows * H * e);
    to_rows<T>([&](int64_t row) { return queries + row * H * d; }, q, H * d, layout_);
    const int64_t value_width = values == layer.keys ? d : e;
    const DecodeArgs args{
        args_.dtype, queries, layer.keys, values, H * d, d, K * d, d, K * value_width, value_width,
        args_.block_table + first_ * args_.table_width, args_.lengths + first_, args_.table_width, H, K, d, e,
        /*tasks_per_row=*/1, args_.scale, out};
    const int64_t per_task = part_of(layout_.rows, 1);
    share((layout_.rows + per_task - 1) / per_task, [&](int64_t task, int64_t) {
      DecodeWorker<T>(args).tasks(task * per_task, std::min((task + 1) * per_task, layout_.rows));
    });
    const Floats attended = attended_.get(layout_, H * e);
    from_rows([&](int64_t row) { return out + row * H * e; }, attended, H * e, layout_);
    return attended;
  }

  void to_cache(void* cache, const Floats& x, int64_t channels) {
    T* to = static_cast<T*>(cache);
    to_rows<T>([&](int64_t row) { return to + args_.slots[first_ + row] * channels; }, x, channels, layout_);
  }

  // [columns, rows] of a weight [rows, columns].
  const T* turned(const T* weight, int64_t rows, int64_t columns) {
    T* out = turned_.get(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        out[j * rows + i] = weight[i * columns + j];
      }
    }
    return out;
  }

  // A vector holds angles of one row: past 125 in one lane, the library takes another way to the sines of all.
  void set_angles() {
    cos_ = cos_memory_.get(layout_, args_.half);
    sin_ = sin_memory_.get(layout_, args_.half);
    const V scale(static_cast<float>(args_.rotary_scale));
    float cosines[kLanes<float>], sines[kLanes<float>];
    for (const Panel& panel : layout_.panels) {
      float *cos = cos_.at(panel), *sin = sin_.at(panel);
      for (int64_t j = 0; j < panel.width; ++j) {
        const int64_t row = panel.first + j;
        const V position(row < layout_.rows ? static_cast<float>(args_.positions[first_ + row]) : 0);
        for (int64_t i = 0; i < args_.half; i += kLanes<float>) {
          const int64_t count = std::min(kLanes<float>, args_.half - i);
          const V angle = position * V::loadu(args_.frequencies + i, count);
          (angle.cos() * scale).store(cosines);
          (angle.sin() * scale).store(sines);
          for (int64_t k = 0; k < count; ++k) {
            cos[(i + k) * panel.width + j] = cosines[k];
            sin[(i + k) * panel.width + j] = sines[k];
          }
        }
      }
    }
    round(cos_, args_.half, layout_);
    round(sin_, args_.half, layout_);
  }

  // The pairs of R channels are turned by the angle of their row; halves come out apart.
  void rotate(const Floats& out, int64_t out_at, const Floats& x, int64_t x_at) {
    const int64_t half = args_.half, step = args_.interleaved ? 2 : 1, second = args_.interleaved ? 1 : half;
    for (const Panel& panel : layout_.panels) {
      const int64_t width = panel.width;
      const float *in = x.at(panel, x_at), *cos = cos_.at(panel), *sin = sin_.at(panel);
      if (args_.interleaved) {
        in = std::copy_n(in, 2 * half * width, moved_.get(2 * half * kPanel)) - 2 * half * width;
      }
      float* to = out.at(panel, out_at);
      for (int64_t i = 0; i < half; ++i) {
        for (int64_t j = 0; j < width; j += kLanes<float>) {
          const V a = V::loadu(in + i * step * width + j), b = V::loadu(in + (i * step + second) * width + j);
          const V c = V::loadu(cos + i * width + j), s = V::loadu(sin + i * width + j);
          (a * c - b * s).store(to + i * width + j);
          fmadd(b, c, a * s).store(to + (i + half) * width + j);
        }
      }
    }
  }

  // ---- MLP and experts ----

  // Of the MLP, or of the shared experts, which have no biases.
  Floats mlp(const LayerArgs& layer, Name gate_name, Name up_name, Name down_name) {
    const int64_t inner = layer[gate_name].outputs;
    const Floats gate = a_.get(layout_, inner), up = b_.get(layout_, inner);
    linears(
        normed_units_, {{gate, layer[gate_name], layer[kGateBias]}, {up, layer[up_name], layer[kUpBias]}}, layout_);
    const Units activated = activate(gate, up, 0, nullptr, inner, layout_);
    return linear(c_, activated, layer[down_name], layer[kDownBias]);
  }

  // silu(gate) up, times the weight of a row, in the place of gate; up begins at its channel `up_at`.
  Units activate(const Floats& gate, const Floats& up, int64_t up_at, const Floats* weight, int64_t inner,
                 const Layout& layout) {
    const Units out = units_of(attended_units_, gate, inner, layout);
    const int64_t per_task = part_of(inner, kBlock);
    share((inner + per_task - 1) / per_task, [&](int64_t task, int64_t) {
      const int64_t begin = task * per_task, end = std::min(begin + per_task, inner);
      for (const Panel& panel : layout.panels) {
        float* g = gate.at(panel);
        const float *u = up.at(panel, up_at), *w = weight == nullptr ? nullptr : weight->at(panel);
        for (int64_t i = begin * panel.width; i < end * panel.width; i += kLanes<float>) {
          const V x = V::loadu(g + i), y = x * sigmoid<float>(x) * V::loadu(u + i);
          (w == nullptr ? y : y * V::loadu(w + i % panel.width)).store(g + i);
        }
      }
      round(gate, begin, end, layout);
      pack(out, gate, begin, end, layout);
    });
    return out;
  }

  Floats experts(const LayerArgs& layer, int64_t moe_layer) {
    const int64_t num_experts = layer[kRouter].outputs, top_k = args_.top_k, rows = layout_.rows, width = args_.width;
    int64_t* ids = args_.experts + (moe_layer * args_.num_rows + first_) * top_k;
    const float* weights = route(layer, ids);
    // Choices sorted by expert: the choice at each place, and the place of each choice.
    ends_.assign(num_experts, 0);
    for (int64_t i = 0; i < rows * top_k; ++i) {
      ++ends_[ids[i]];
    }
    for (int64_t e = 1; e < num_experts; ++e) {
      ends_[e] += ends_[e - 1];
    }
    choice_.resize(rows * top_k);
    place_.resize(rows * top_k);
    for (int64_t i = rows * top_k - 1; i >= 0; --i) {
      place_[i] = --ends_[ids[i]];
      choice_[place_[i]] = i;
    }
    const int64_t stride = padded(width);
    float *in = row_memory_.get(rows * stride), *out = expert_rows_.get(rows * top_k * stride);
    to_rows<float>([&](int64_t row) { return in + row * stride; }, normed_, width, layout_);
    for (int64_t e = 0; e < num_experts; ++e) {
      const int64_t begin = ends_[e], end = e + 1 < num_experts ? ends_[e + 1] : rows * top_k;
      if (begin < end) {
        expert(layer, e, in, choice_.data() + begin, end - begin, weights, out + begin * stride);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* sum = in + row * stride;
      const float* first = out + place_[row * top_k] * stride;
      std::copy(first, first + width, sum);
      for (int64_t k = 1; k < top_k; ++k) {
        const float* add = out + place_[row * top_k + k] * stride;
        for (int64_t c = 0; c < width; ++c) {
          sum[c] += add[c];
        }
      }
    }
    const Floats sum = routed_.get(layout_, width);
    from_rows([&](int64_t row) { return in + row * stride; }, sum, width, layout_);
    round(sum, width, layout_);
    return sum;
  }

  // Chooses experts by fp32 logits; returns their weights [rows, K].
  const float* route(const LayerArgs& layer, int64_t* ids) {
    const int64_t num_experts = layer[kRouter].outputs, rows = layout_.rows;
    const Floats scores = b_.get(layout_, num_experts);
    project(scores, 0, normed_, 0, layer[kRouter], layout_);
    for (const Panel& panel : layout_.panels) {
      for (int64_t j = 0; j < panel.width; j += kLanes<float>) {
        score(scores.at(panel) + j, num_experts, panel.width, layer.has(kRouterBias));
      }
    }
    float *score_rows = score_rows_.get(rows * num_experts), *weights = weight_rows_.get(rows * args_.top_k);
    to_rows<float>([&](int64_t row) { return score_rows + row * num_experts; }, scores, num_experts, layout_);
    R1FAST_PASTE(route_tokens_, CPU_CAPABILITY)(
        {at::kFloat, score_rows, layer[kRouterBias].data, num_experts, args_.top_k, args_.n_group, args_.topk_group,
         args_.norm_topk_prob, args_.routed_scaling_factor, false, ids, weights},
        0, rows);
    return weights;
  }

  static void score(float* x, int64_t num_experts, int64_t stride, bool is_sigmoid) {
    if (is_sigmoid) {
      for (int64_t e = 0; e < num_experts; ++e) {
        (V(1) + V::loadu(x + e * stride).neg().exp()).reciprocal().store(x + e * stride);
      }
      return;
    }
    V top = V::loadu(x), total(0);
    for (int64_t e = 1; e < num_experts; ++e) {
      top = maximum(top, V::loadu(x + e * stride));
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      const V exponential = (V::loadu(x + e * stride) - top).exp();
      exponential.store(x + e * stride);
      total = total + exponential;
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      (V::loadu(x + e * stride) / total).store(x + e * stride);
    }
  }

  // The rows that chose expert e, `choices` of [rows, K]: gathered, through its MLP, and to `out`.
  void expert(const LayerArgs& layer, int64_t e, const float* rows, const int32_t* choices, int64_t count,
              const float* weights, float* out) {
    const int64_t width = args_.width, stride = padded(width), inner = layer[kExpertDown].inputs;
    chosen_.set(count);
    const Floats in = c_.get(chosen_, width);
    const Floats weight = chosen_weights_.get(chosen_, 1);
    for (const Panel& panel : chosen_.panels) {
      float* gathered = gathered_.get(kPanel * stride);
      for (int64_t i = 0; i < panel.width; ++i) {
        const int64_t m = panel.first + i;
        if (m < count) {
          std::copy_n(rows + choices[m] / args_.top_k * stride, stride, gathered + i * stride);
        } else {
          std::fill_n(gathered + i * stride, stride, 0.f);
        }
        weight.at(panel)[i] = m < count ? weights[choices[m]] : 0;
      }
      transpose(in.at(panel), panel.width, gathered, stride, panel.width, stride);
    }
    const Units in_units = pack(attended_units_, in, width, chosen_);
    const Floats both = Products::linear(a_, in_units, of_expert(layer[kExpertGateUp], e), {}, chosen_);
    const Units activated = activate(both, both, inner, &weight, inner, chosen_);
    const Floats y = Products::linear(b_, activated, of_expert(layer[kExpertDown], e), {}, chosen_);
    to_rows<float>([&](int64_t m) { return out + m * stride; }, y, width, chosen_);
  }

  static Weight of_expert(const Weight& first, int64_t e) {
    return {static_cast<const T*>(first.data) + e * first.outputs * first.inputs, first.outputs, first.inputs};
  }

  // ---- the parts ----

  // normed_ and normed_units_ of x_.
  void normalize(const Weight& weight) {
    normed_ = normed_memory_.get(layout_, args_.width);
    norm(normed_, 0, x_, 0, args_.width, weight, args_.eps);
    round(normed_, args_.width, layout_);
    normed_units_ = pack(normed_unit_memory_, normed_, args_.width, layout_);
  }

  void add(const Floats& y) { accumulate(x_, y, args_.width); }

  void accumulate(const Floats& sum, const Floats& y, int64_t channels) {
    for (const Panel& panel : layout_.panels) {
      float* to = sum.at(panel);
      const float* from = y.at(panel);
      for (int64_t i = 0; i < channels * panel.width; i += kLanes<float>) {
        (V::loadu(to + i) + V::loadu(from + i)).store(to + i);
      }
    }
    round(sum, channels, layout_);
  }

  void norm(const Floats& out, int64_t out_at, const Floats& x, int64_t x_at, int64_t channels, const Weight& weight,
            double eps) {
    const T* w = static_cast<const T*>(weight.data);
    for (const Panel& panel : layout_.panels) {
      for (int64_t j = 0; j < panel.width; j += kLanes<float>) {
        const float* in = x.at(panel, x_at) + j;
        float* to = out.at(panel, out_at) + j;
        V sums[4] = {V(0), V(0), V(0), V(0)};
        for (int64_t c = 0; c < channels; ++c) {
          const V value = V::loadu(in + c * panel.width);
          sums[c % 4] = fmadd(value, value, sums[c % 4]);
        }
        const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const V rstd = (sum / V(static_cast<float>(channels)) + V(static_cast<float>(eps))).sqrt().reciprocal();
        for (int64_t c = 0; c < channels; ++c) {
          (V::loadu(in + c * panel.width) * rstd * V(static_cast<float>(w[c]))).store(to + c * panel.width);
        }
      }
    }
  }

  Floats linear(SheetMemory<float>& memory, const Units& in, const Weight& weight, const Weight& bias = {}) {
    return Products::linear(memory, in, weight, bias, layout_);
  }

  // What products read; x holds rounded values.
  static Units pack(SheetMemory<Unit>& memory, const Floats& x, int64_t channels, const Layout& layout) {
    const Units out = units_of(memory, x, channels, layout);
    pack(out, x, 0, channels, layout);
    return out;
  }

  static Units units_of(SheetMemory<Unit>& memory, const Floats& x, int64_t channels, const Layout& layout) {
    if constexpr (kValues<Unit> == 1) {
      return x;
    } else {
      return memory.get(layout, channels / 2);
    }
  }

  static void pack(const Units& out, const Floats& x, int64_t begin, int64_t end, const Layout& layout) {
    if constexpr (kValues<Unit> != 1) {
      for (const Panel& panel : layout.panels) {
        for (int64_t c = begin; c < end; c += 2) {
          round_across(out.at(panel, c / 2), x.at(panel, c), x.at(panel, c + 1), panel.width);
        }
      }
    }
  }

  // from(row): where the channels of a row are.
  template <typename From>
  void from_rows(const From& from, const Floats& out, int64_t channels, const Layout& layout) {
    const int64_t columns = padded(channels);
    for (const Panel& panel : layout.panels) {
      float* wide = wide_[0].get(kPanel * columns);
      const int64_t count = std::min(panel.width, layout.rows - panel.first);
      for (int64_t i = 0; i < count; ++i) {
        widen(wide + i * columns, from(panel.first + i), channels);
      }
      std::fill(wide + count * columns, wide + panel.width * columns, 0.f);
      transpose(out.at(panel), panel.width, wide, columns, panel.width, columns);
    }
  }

  // to(row): where the channels of a row go.
  template <typename Value, typename To>
  void to_rows(const To& to, const Floats& x, int64_t channels, const Layout& layout, int64_t worker = 0) {
    const int64_t columns = padded(channels);
    for (const Panel& panel : layout.panels) {
      float* wide = wide_[worker].get(kPanel * columns);
      transpose(wide, columns, x.at(panel), panel.width, columns, panel.width);
      for (int64_t i = 0; i < std::min(panel.width, layout.rows - panel.first); ++i) {
        narrow<Value>(to(panel.first + i), wide + i * columns, channels);
      }
    }
  }

  const LayersArgs& args_;
  int64_t first_ = 0;
  Layout layout_, chosen_;
  Floats x_, cos_, sin_, normed_;
  Units normed_units_;
  SheetMemory<float> x_memory_, cos_memory_, sin_memory_, normed_memory_, a_, b_, c_, attended_, routed_, chosen_weights_;
  SheetMemory<Unit> normed_unit_memory_, attended_units_;
  Scratch<float> moved_, row_memory_, expert_rows_, score_rows_, weight_rows_, gathered_;
  Scratch<T> query_rows_, out_rows_, turned_;
  std::vector<Scratch<float>> wide_;  // of each worker
  std::vector<SheetMemory<float>> logits_;
  std::vector<int32_t> ends_, choice_, place_;
};

template <typename T, typename Unit>
void run_chunks(const LayersArgs& args, int64_t begin, int64_t end) {
  RowsWorker<T, Unit> worker(args);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    worker.run(args.chunk_rows[chunk], args.chunk_rows[chunk + 1] - args.chunk_rows[chunk]);
  }
}

}  // namespace

}  // namespace r1fast
