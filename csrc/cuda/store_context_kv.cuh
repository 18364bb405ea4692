// store_context_kv on the GPU: all layers, keys and values, in one launch, limited by memory bandwidth.
//
// The usual case (this file): a group of 4 to 32 lanes, a power of two, has a head; a lane has two vectors of 16
// bytes of its keys and two of its values. The two key vectors are those that the rotation turns against each
// other, so it needs no exchange between lanes; only the sum of squares does. With h = rotary_dim / 2 in vectors
// and n lanes in use, lane j has the vectors
//     j < h   j and h + j                (turned)
//     j >= h  h + j and n + j            (behind rotary_dim)
// which is right for neighbours too: those lie within a vector, and the first 2h vectors are the turned ones.
// Groups of a warp take consecutive heads, then consecutive tokens; a warp stays in one layer and goes over its
// heads in passes, the next pass being fetched while this one is computed. Layers are the fastest grid index:
// blocks that run together read neighbouring memory and the same rows of cos_sin_cache.
//
// Head sizes, rotations and strides that do not fit are in store_context_kv_any.cuh.
#pragma once

#include <type_traits>

#include "grid.cuh"
#include "numbers.cuh"
#include "store_context_kv_any.cuh"

namespace vllm_dflash::cuda {

// Below this many warps the GPU is not full: passes are spread over blocks, too. (The tests' batches are small, so
// their emulation sets another number.)
#if !defined(VD_STORE_FEW_WARPS)
#define VD_STORE_FEW_WARPS 4096
#endif
constexpr int64_t kStoreFewWarps = VD_STORE_FEW_WARPS;
// Thread blocks that share a multiprocessor: caps the registers of a thread, at 96 without a spill. Before Hopper
// float8 is rounded in software, which takes more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kStoreBlocks = 4;
#else
constexpr int kStoreBlocks = 5;
#endif

struct VectorShape {
  int lanes_used = 0;   // n; 0 where the vector path does not fit
  int lane_bits = 0;    // log2 of the lanes of a group
  int rope_lanes = 0;   // h
  int head_bits = 0;    // log2 of the heads in a pass
  int num_passes = 0;   // over the heads of a layer
  int pass_splits = 1;  // blocks that share the passes: 1 or num_passes
  // Keys and values are asked for before the slot is known: a latency less where there is little work, wasted
  // bandwidth where there is much and tokens are skipped.
  bool speculate = false;
  float inverse_head_size = 0;
  LaunchShape launch;
};

inline bool store_vector_fits(const StoreContextKvParams& p, int element_size, int cache_element_size) {
  const int vector_size = 16 / element_size;
  if (p.head_size % (2 * vector_size) != 0 || p.head_size > 2 * vector_size * kWarpSize) return false;
  if (p.rotary_dim / 2 % vector_size != 0) return false;
  const auto fits = [=](int64_t stride, int64_t size) { return size == 1 || stride % vector_size == 0; };
  if (!is_multiple(p.kv, 16) || !is_multiple(p.k_norm_weights, 16) || !is_multiple(p.cos_sin_cache, 16) ||
      !fits(p.kv_token_stride, p.num_tokens) || !fits(p.kv_layer_stride, p.num_layers) || !fits(p.kv_value_offset, 2)) {
    return false;
  }
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    for (const PagedCache* cache : {&p.keys[layer], &p.values[layer]}) {
      if (!is_multiple(cache->data, vector_size * cache_element_size) || !fits(cache->block_stride, p.num_blocks) ||
          !fits(cache->token_stride, p.kv_block_size) || !fits(cache->head_stride, p.num_heads)) {
        return false;
      }
    }
  }
  return true;
}

inline VectorShape store_vector_shape(const StoreContextKvParams& p, int element_size, int cache_element_size) {
  VectorShape shape;
  if (!store_vector_fits(p, element_size, cache_element_size)) return shape;
  const int vector_size = 16 / element_size;
  shape.lanes_used = static_cast<int>(p.head_size / (2 * vector_size));
  shape.lane_bits = shape.lanes_used <= 4 ? 2 : log2_ceil(shape.lanes_used);
  shape.rope_lanes = static_cast<int>(p.rotary_dim / 2 / vector_size);
  const int group_bits = log2_ceil(kWarpSize) - shape.lane_bits;
  shape.head_bits = log2_ceil(p.num_heads) < group_bits ? log2_ceil(p.num_heads) : group_bits;
  shape.num_passes = static_cast<int>(ceil_div(p.num_heads, int64_t{1} << shape.head_bits));
  const int64_t warps = ceil_div(p.num_tokens, int64_t{1} << (group_bits - shape.head_bits)) * p.num_layers;
  shape.speculate = warps < kStoreFewWarps;
  shape.pass_splits = shape.speculate ? shape.num_passes : 1;
  shape.inverse_head_size = 1.0f / static_cast<float>(p.head_size);
  const int64_t tokens_per_block = kStoreThreads >> shape.lane_bits >> shape.head_bits;
  shape.launch.threads = kStoreThreads;
  shape.launch.blocks_x = ceil_div(p.num_tokens, tokens_per_block) * p.num_layers * shape.pass_splits;
  return shape;
}

// A lane's share of a head, as it lies in memory.
template <typename T>
struct HeadVectors {
  Packed<T, 16 / sizeof(T)> key_a, key_b, value_a, value_b;
};

template <typename T, typename Cache>
__device__ __forceinline__ void store_values(const HeadVectors<T>& from, float factor, Cache* to, int to_b) {
  if constexpr (std::is_same_v<T, Cache>) {
    if (factor == 1.0f) {
      from.value_a.store(to);
      from.value_b.store(to + to_b);
      return;
    }
  }
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  float a[kVector];
  float b[kVector];
  unpack(from.value_a, a);
  unpack(from.value_b, b);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    a[i] *= factor;
    b[i] *= factor;
  }
  pack<Cache>(a).store(to);
  pack<Cache>(b).store(to + to_b);
}

template <typename T, typename Cache>
__global__ void __launch_bounds__(kStoreThreads, kStoreBlocks)
    store_context_kv_kernel(const __grid_constant__ StoreContextKvParams p, const __grid_constant__ VectorShape shape) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  using Vector = Packed<T, kVector>;

  const unsigned parts = static_cast<unsigned>(p.num_layers) * shape.pass_splits;
  const unsigned token_block = blockIdx.x / parts;
  const unsigned part = blockIdx.x - token_block * parts;
  const unsigned layer = part / shape.pass_splits;
  const int first_pass = shape.pass_splits == 1 ? 0 : static_cast<int>(part - layer * shape.pass_splits);
  const int last_pass = shape.pass_splits == 1 ? shape.num_passes : first_pass + 1;

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int group = lane >> shape.lane_bits;
  const int j = lane & ((1 << shape.lane_bits) - 1);
  const int64_t warp_index = static_cast<int64_t>(token_block) * (kStoreThreads / kWarpSize) + warp;
  const int tokens_per_warp = kWarpSize >> shape.lane_bits >> shape.head_bits;
  const int64_t token = warp_index * tokens_per_warp + (group >> shape.head_bits);
  const int head_in_pass = group & ((1 << shape.head_bits) - 1);
  const bool in_batch = j < shape.lanes_used && token < p.num_tokens;
  const bool turned = j < shape.rope_lanes;
  const int at_a = (turned ? j : shape.rope_lanes + j) * kVector;
  const int at_b = (turned ? shape.rope_lanes + j : shape.lanes_used + j) * kVector;
  const int to_b = at_b - at_a;
  const int first_head = (first_pass << shape.head_bits) + head_in_pass;
  // The lane's first vector of the head that is fetched next.
  const T* source = static_cast<const T*>(p.kv) + token * p.kv_token_stride + layer * p.kv_layer_stride +
                    first_head * static_cast<int>(p.head_size) + at_a;

  const auto fetch = [&](int head) {
    HeadVectors<T> out = {};
    if (head < p.num_heads) {
      const T* values = source + p.kv_value_offset;
      out.key_a = Vector::load_once(source);
      out.key_b = Vector::load_once(source + to_b);
      out.value_a = Vector::load_once(values);
      out.value_b = Vector::load_once(values + to_b);
    }
    source += static_cast<int>(p.head_size) << shape.head_bits;
    return out;
  };

  HeadVectors<T> next = {};
  if (shape.speculate && in_batch) next = fetch(first_head);
  const int64_t slot = in_batch ? read_slot(p, layer, token) : kPadSlot;
  const bool wanted = slot != kPadSlot;
  // A whole warp, so that the sums below have all their lanes.
  if (!__any_sync(kAllLanes, wanted)) return;
  if (!shape.speculate && wanted) next = fetch(first_head);

  // Lanes that do not turn multiply by one and add nothing.
  float cosines[kVector];
  float sines[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    cosines[i] = 1.0f;
    sines[i] = 0.0f;
  }
  if (turned && wanted) {
    const int64_t at = read_position(p, token) * p.rotary_dim;
    const int half = shape.rope_lanes * kVector;
    const auto load = [&](const auto* table) {
      if (p.is_neox) {
        load_floats<std::remove_cvref_t<decltype(*table)>, kVector>(table + at_a, cosines);
        load_floats<std::remove_cvref_t<decltype(*table)>, kVector>(table + half + at_a, sines);
      } else {
        using R = std::remove_cvref_t<decltype(*table)>;
        constexpr int kPairs = kVector / 2;
        load_floats<R, kPairs>(table + at_a / 2, cosines);
        load_floats<R, kPairs>(table + at_b / 2, cosines + kPairs);
        load_floats<R, kPairs>(table + half + at_a / 2, sines);
        load_floats<R, kPairs>(table + half + at_b / 2, sines + kPairs);
      }
    };
    if (p.rope_dtype == Float::kFloat32) {
      load(static_cast<const float*>(p.cos_sin_cache) + at);
    } else {
      load(static_cast<const T*>(p.cos_sin_cache) + at);
    }
  }

  // Kept as they lie in memory: unpacking once a pass is cheaper than the registers.
  Vector weights_a = {};
  Vector weights_b = {};
  if (wanted) {
    const T* weights = static_cast<const T*>(p.k_norm_weights) + layer * p.head_size;
    weights_a = Vector::load(weights + at_a);
    weights_b = Vector::load(weights + at_b);
  }
  const float key_factor = key_store_factor(p, layer);
  const float value_factor = value_store_factor(p, layer);
  const SlotPlace place = find_place(p, wanted ? slot : 0);
  const PagedCache& key_cache = p.keys[layer];
  const PagedCache& value_cache = p.values[layer];
  Cache* key_out =
      static_cast<Cache*>(key_cache.data) + place.offset(key_cache) + first_head * key_cache.head_stride + at_a;
  Cache* value_out =
      static_cast<Cache*>(value_cache.data) + place.offset(value_cache) + first_head * value_cache.head_stride + at_a;

  const int heads_in_pass = 1 << shape.head_bits;
  int head = first_head;
  for (int pass = first_pass; pass < last_pass; ++pass, head += heads_in_pass) {
    const HeadVectors<T> now = next;
    if (wanted && pass + 1 < last_pass) next = fetch(head + heads_in_pass);

    float a[kVector];
    float b[kVector];
    unpack(now.key_a, a);
    unpack(now.key_b, b);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += a[i] * a[i] + b[i] * b[i];
#pragma unroll
    for (int bit = 4; bit >= 0; --bit) {
      if (bit < shape.lane_bits) sum += __shfl_xor_sync(kAllLanes, sum, 1 << bit);
    }
    const float scale = rsqrtf(sum * shape.inverse_head_size + p.eps) * key_factor;
    float weight[kVector];
    unpack(weights_a, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) a[i] *= scale * weight[i];
    unpack(weights_b, weight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) b[i] *= scale * weight[i];
    if (p.is_neox) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) turn(a[i], b[i], cosines[i], sines[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; i += 2) {
        turn(a[i], a[i + 1], cosines[i / 2], sines[i / 2]);
        turn(b[i], b[i + 1], cosines[kVector / 2 + i / 2], sines[kVector / 2 + i / 2]);
      }
    }

    if (wanted && head < p.num_heads) {
      pack<Cache>(a).store(key_out);
      pack<Cache>(b).store(key_out + to_b);
      store_values<T, Cache>(now, value_factor, value_out, to_b);
    }
    key_out += key_cache.head_stride << shape.head_bits;
    value_out += value_cache.head_stride << shape.head_bits;
  }
}

template <typename T, typename Cache, typename Launch>
void launch_store_of(const StoreContextKvParams& p, const Launch& launch) {
  const VectorShape shape = store_vector_shape(p, sizeof(T), sizeof(Cache));
  if (shape.lanes_used == 0) {
    launch(store_context_kv_any_kernel<T, Cache>, store_any_launch(p), p);
  } else {
    launch(store_context_kv_kernel<T, Cache>, shape.launch, p, shape);
  }
}

// Cache is the dtype of kv or a float8.
template <typename T, typename Launch>
void launch_store_context_kv(const StoreContextKvParams& p, const Launch& launch) {
  switch (p.cache_dtype) {
    case Float::kFloat8E4M3:
      return launch_store_of<T, Float8E4M3>(p, launch);
    case Float::kFloat8E5M2:
      return launch_store_of<T, Float8E5M2>(p, launch);
    default:
      return launch_store_of<T, T>(p, launch);
  }
}

}  // namespace vllm_dflash::cuda
