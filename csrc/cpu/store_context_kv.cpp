// store_context_kv on the CPU. vLLM's CPU attention packs its cache its own way, so serving points the
// "caches" at staging rows (slots none) and hands those to vLLM's writer; strided caches work as on CUDA.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "ops.h"
#include "vectors.h"

namespace vllm_dflash::cpu {
namespace {

// Elements of K and V a task handles at least: below that a thread costs more than it saves.
constexpr int64_t kElementsPerTask = 16384;

struct Scratch {
  std::vector<float> row, cos_sin;
};

// Writes heads [N, D] held as float32 in `row` to token `slot` of a paged cache.
void write_row(const StoreContextKvParams& p, const PagedCache& cache, int64_t slot, const float* row) {
  const int64_t size = element_size(p.cache_dtype);
  auto* out = static_cast<char*>(cache.data) +
              (slot / p.kv_block_size * cache.block_stride + slot % p.kv_block_size * cache.token_stride) * size;
  if (cache.head_stride == p.head_size || p.num_heads == 1) {
    store_row(p.cache_dtype, row, out, p.num_heads * p.head_size);
    return;
  }
  for (int64_t head = 0; head < p.num_heads; ++head) {
    store_row(p.cache_dtype, row + head * p.head_size, out + head * cache.head_stride * size, p.head_size);
  }
}

void store_token(const StoreContextKvParams& p, const std::vector<float>& weights, int64_t token, Scratch& scratch) {
  const int64_t width = p.num_heads * p.head_size;
  const int64_t size = element_size(p.dtype);
  const auto* kv = static_cast<const char*>(p.kv) + token * p.kv_token_stride * size;
  const auto* rope =
      static_cast<const char*>(p.cos_sin_cache) + p.positions.get(token) * p.rotary_dim * element_size(p.rope_dtype);
  load_row(p.rope_dtype, rope, scratch.cos_sin.data(), p.rotary_dim);
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    const int64_t slot = p.slots[layer] ? p.slots[layer][token] : token;
    if (slot < 0) continue;
    const char* keys = kv + layer * p.kv_layer_stride * size;
    float* row = scratch.row.data();
    load_row(p.dtype, keys, row, width);
    norm_rope_row(row, p.num_heads, p.head_size, weights.data() + layer * p.head_size, p.eps, scratch.cos_sin.data(),
                  p.rotary_dim, p.is_neox);
    if (p.key_scales) divide_row(row, p.key_scales[layer], width);
    write_row(p, p.keys[layer], slot, row);

    load_row(p.dtype, keys + p.kv_value_offset * size, row, width);
    if (p.value_scale != 1.0f) scale_row(row, p.value_scale, width);
    if (p.value_scales) divide_row(row, p.value_scales[layer], width);
    write_row(p, p.values[layer], slot, row);
  }
}

// The data of a CPU tensor can be looked at for free, so bad indices end in an error, not in memory.
void check_data(const StoreContextKvParams& p) {
  const Checker check("store_context_kv", Place::kCpu);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int64_t position = p.positions.get(t);
    check.require(position >= 0 && position < p.num_positions, "positions[", t, "] is ", position,
                  ", cos_sin_cache has ", p.num_positions, " rows");
  }
  const int64_t capacity = p.num_blocks * p.kv_block_size;
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    const int64_t* slots = p.slots[layer];
    if (slots == nullptr || (layer > 0 && slots == p.slots[layer - 1])) continue;
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      check.require(slots[t] < capacity, "slots of layer ", layer, " hold ", slots[t], " for token ", t,
                    ", the caches have ", capacity, " slots");
    }
  }
}

}  // namespace

void store_context_kv(Tensor kv, Tensor k_norm_weights, double eps, Tensor positions, Tensor cos_sin_cache,
                      bool is_neox, double value_scale, std::vector<Tensor> slots, std::vector<Tensor> key_caches,
                      std::vector<Tensor> value_caches, OptionalTensor key_scales, OptionalTensor value_scales) {
  const StoreContextKvParams p =
      check_store_context_kv(Place::kCpu, kv, k_norm_weights, eps, positions, cos_sin_cache, is_neox, value_scale,
                             slots, key_caches, value_caches, key_scales, value_scales);
  if (p.num_tokens == 0 || p.num_heads == 0) return;
  check_data(p);
  const int64_t width = p.num_heads * p.head_size;
  std::vector<float> weights(p.num_layers * p.head_size);
  load_row(p.dtype, p.k_norm_weights, weights.data(), p.num_layers * p.head_size);
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (2 * p.num_layers * width));
  torch::stable::parallel_for(0, p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch{std::vector<float>(width), std::vector<float>(p.rotary_dim)};
    for (int64_t token = begin; token < end; ++token) store_token(p, weights, token, scratch);
  });
}

}  // namespace vllm_dflash::cpu
