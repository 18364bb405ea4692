// store_context_kv for every head size, rotation and stride: a warp a head, an element a lane. And what it shares
// with the vector path (store_context_kv.cuh).
#pragma once

#include "grid.cuh"
#include "numbers.cuh"

namespace vllm_dflash::cuda {

constexpr int kStoreThreads = 128;

// Cache slot of a token in a layer, kPadSlot where there is none or it is outside the caches.
__device__ __forceinline__ int64_t read_slot(const StoreContextKvParams& p, unsigned layer, int64_t token) {
  const int64_t slot = p.slots[layer] ? p.slots[layer][token] : token;
  return slot >= 0 && slot < p.num_blocks * p.kv_block_size ? slot : kPadSlot;
}

// Row of cos_sin_cache. Skipped tokens may have any position, and one outside would fault the whole context.
__device__ __forceinline__ int64_t read_position(const StoreContextKvParams& p, int64_t token) {
  const int64_t position = p.positions.get(token);
  return position < 0 ? 0 : position < p.num_positions ? position : p.num_positions - 1;
}

struct SlotPlace {
  int64_t block;
  int64_t token;

  __device__ __forceinline__ int64_t offset(const PagedCache& cache) const {
    return block * cache.block_stride + token * cache.token_stride;
  }
};

// The launcher makes sure that slots fit 31 bits.
__device__ __forceinline__ SlotPlace find_place(const StoreContextKvParams& p, int64_t slot) {
  const auto narrow = static_cast<unsigned>(slot);
  const auto size = static_cast<unsigned>(p.kv_block_size);
  const unsigned block = narrow / size;
  return {block, narrow - block * size};
}

// The rotation is linear, so a cache's scale is applied to keys together with their norm.
__device__ __forceinline__ float key_store_factor(const StoreContextKvParams& p, unsigned layer) {
  return p.key_scales ? 1.0f / p.key_scales[layer] : 1.0f;
}

__device__ __forceinline__ float value_store_factor(const StoreContextKvParams& p, unsigned layer) {
  return p.value_scales ? p.value_scale / p.value_scales[layer] : p.value_scale;
}

__device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) {
  const float x = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = x;
}

inline LaunchShape store_any_launch(const StoreContextKvParams& p) {
  LaunchShape launch;
  launch.threads = kStoreThreads;
  launch.blocks_x = ceil_div(p.num_tokens * p.num_heads, kStoreThreads / kWarpSize) * p.num_layers;
  return launch;
}

template <typename T, typename Cache>
__global__ void __launch_bounds__(kStoreThreads)
    store_context_kv_any_kernel(const __grid_constant__ StoreContextKvParams p) {
  const auto num_layers = static_cast<unsigned>(p.num_layers);
  const unsigned head_block = blockIdx.x / num_layers;
  const unsigned layer = blockIdx.x - head_block * num_layers;
  const unsigned index = head_block * (kStoreThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const auto num_heads = static_cast<unsigned>(p.num_heads);
  const unsigned token = index / num_heads;
  const unsigned head = index - token * num_heads;
  if (token >= p.num_tokens) return;
  const int64_t slot = read_slot(p, layer, token);
  if (slot == kPadSlot) return;  // the whole warp: it has one token

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int head_size = static_cast<int>(p.head_size);
  const int rotary_dim = static_cast<int>(p.rotary_dim);
  const int half = rotary_dim / 2;
  const T* keys =
      static_cast<const T*>(p.kv) + token * p.kv_token_stride + layer * p.kv_layer_stride + head * p.head_size;
  const T* values = keys + p.kv_value_offset;
  const T* weights = static_cast<const T*>(p.k_norm_weights) + layer * p.head_size;
  const SlotPlace place = find_place(p, slot);
  Cache* const key_out =
      static_cast<Cache*>(p.keys[layer].data) + place.offset(p.keys[layer]) + head * p.keys[layer].head_stride;
  Cache* const value_out =
      static_cast<Cache*>(p.values[layer].data) + place.offset(p.values[layer]) + head * p.values[layer].head_stride;

  float sum = 0.0f;
  for (int i = lane; i < head_size; i += kWarpSize) {
    const float x = to_float(keys[i]);
    sum += x * x;
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  const float scale = rsqrtf(sum / static_cast<float>(head_size) + p.eps) * key_store_factor(p, layer);
  const auto normed = [&](int i) { return to_float(keys[i]) * (scale * to_float(weights[i])); };
  const auto cos_sin = [&](int64_t at) {
    return p.rope_dtype == Float::kFloat32 ? static_cast<const float*>(p.cos_sin_cache)[at]
                                           : to_float(static_cast<const T*>(p.cos_sin_cache)[at]);
  };

  const int64_t rope_row = read_position(p, token) * p.rotary_dim;
  for (int pair = lane; pair < half; pair += kWarpSize) {
    const int at_a = p.is_neox ? pair : 2 * pair;
    const int at_b = p.is_neox ? half + pair : 2 * pair + 1;
    float a = normed(at_a);
    float b = normed(at_b);
    turn(a, b, cos_sin(rope_row + pair), cos_sin(rope_row + half + pair));
    key_out[at_a] = round_to<Cache>(a);
    key_out[at_b] = round_to<Cache>(b);
  }
  for (int i = rotary_dim + lane; i < head_size; i += kWarpSize) key_out[i] = round_to<Cache>(normed(i));

  const float value_factor = value_store_factor(p, layer);
  for (int i = lane; i < head_size; i += kWarpSize) value_out[i] = round_to<Cache>(to_float(values[i]) * value_factor);
}

}  // namespace vllm_dflash::cuda
