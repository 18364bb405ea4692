// What each op gets after its arguments are checked: plain pointers, sizes and strides, no torch.
// The CPU and the CUDA kernels read the same structures; csrc/checks.h fills them.
//
// Letters: B requests, T context tokens, Q query tokens a request, K draft tokens a request, G KV-cache
// groups, L draft layers, N KV heads, D head size, R request states, W features of a token.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VD_HOST_DEVICE inline
#endif

namespace vllm_dflash {

// As in vLLM: a slot that no cache write touches (PAD_SLOT_ID), and the block that holds nothing.
constexpr int64_t kPadSlot = -1;
constexpr int64_t kNullBlock = 0;

constexpr int kMaxGroups = 8;
constexpr int kMaxLayers = 32;

// A one-dimensional integer tensor, int32 or int64, contiguous; data is null where it was not given.
struct Ints {
  void* data = nullptr;
  int64_t size = 0;
  bool wide = false;  // int64

  VD_HOST_DEVICE int64_t get(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  VD_HOST_DEVICE void set(int64_t i, int64_t value) const {
    if (wide) {
      static_cast<int64_t*>(data)[i] = value;
    } else {
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
    }
  }
};

struct BlockTable {
  const int32_t* data = nullptr;  // [>= B, width]
  int64_t row_stride = 0;
  int64_t width = 0;
  int64_t kv_block_size = 0;

  // Cache slot of a request's token; kPadSlot where its block is none or outside the table.
  VD_HOST_DEVICE int64_t slot(int64_t request, int64_t position) const {
    const int64_t block = position / kv_block_size;
    if (position < 0 || block >= width) return kPadSlot;
    const int64_t id = data[request * row_stride + block];
    return id <= kNullBlock ? kPadSlot : id * kv_block_size + position % kv_block_size;
  }
};

struct BuildBlockParams {
  int64_t num_requests = 0;       // B
  int64_t num_context = 0;        // T
  int64_t num_query_per_request = 0;  // Q = K + 1, or K with sample_from_anchor
  int64_t num_draft_tokens = 0;   // K
  int64_t num_groups = 0;         // G
  int64_t num_states = 0;         // rows that every request-state tensor has; B without request_index
  int64_t mask_token_id = 0;
  int64_t max_model_len = 0;
  bool sample_from_anchor = false;

  Ints anchor_ids;       // [B], or [R] with request_index
  Ints target_positions; // [T]
  Ints query_start_loc;  // [B + 1]
  Ints num_rejected;     // [B] or none
  Ints seq_lens;         // [B] or none
  Ints request_index;    // [B] or none: request i has state row request_index[i]
  Ints num_sampled;      // [B] or none
  Ints prefill_ids;      // [R] or none: anchors of requests that have sampled nothing
  const float* temperature = nullptr;  // [R]
  Ints seeds;                          // [R]
  BlockTable block_tables[kMaxGroups];

  Ints input_ids;          // [>= B*Q]
  Ints query_positions;    // [>= B*Q]
  int64_t* query_slots[kMaxGroups] = {};  // rows of query_slots_size
  int64_t query_slots_size = 0;
  Ints context_positions;  // [>= T]
  int64_t* context_slots[kMaxGroups] = {};  // rows of context_slots_size
  int64_t context_slots_size = 0;
  Ints sample_indices;     // [>= B*K]
  Ints block_start_loc;    // [>= B + 1]
  Ints block_seq_lens;     // [>= B]
  Ints sample_positions;   // [>= B*K] or none
  Ints sample_requests;    // [>= B*K] or none
  float* temperature_out = nullptr;  // [R]
  Ints seeds_out;                    // [R]
};

enum class Float : int { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2 };

struct TapParams {
  Float dtype = Float::kFloat32;
  int64_t num_tokens = 0;   // T
  int64_t hidden_size = 0;  // H
  const void* hidden = nullptr;    // [T, H]
  int64_t hidden_stride = 0;       // of a row, in elements, as all strides
  const void* residual = nullptr;  // [T, H] or none
  int64_t residual_stride = 0;
  void* features = nullptr;        // already at the first column written
  int64_t features_stride = 0;
};

// One layer's keys or values in a paged cache [blocks, kv_block_size, N, D], inner stride 1.
struct PagedCache {
  void* data = nullptr;
  int64_t block_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct StoreContextKvParams {
  Float dtype = Float::kFloat32;        // of kv and the K-norm weights
  Float cache_dtype = Float::kFloat32;  // dtype, or a float8
  Float rope_dtype = Float::kFloat32;   // of cos_sin_cache: float32 or dtype
  int64_t num_tokens = 0;  // T
  int64_t num_layers = 0;  // L
  int64_t num_heads = 0;   // N
  int64_t head_size = 0;   // D
  int64_t rotary_dim = 0;  // <= D; cos_sin_cache is [P, rotary_dim], cosines first
  int64_t num_positions = 0;  // P
  int64_t kv_block_size = 0;
  int64_t num_blocks = 0;
  bool is_neox = true;
  float eps = 0;
  float value_scale = 1;

  const void* kv = nullptr;  // [T, L, 2, N, D]; heads and elements contiguous
  int64_t kv_token_stride = 0;
  int64_t kv_layer_stride = 0;
  int64_t kv_value_offset = 0;  // from keys to values
  const void* k_norm_weights = nullptr;  // [L, D] contiguous
  const void* cos_sin_cache = nullptr;   // contiguous
  Ints positions;                        // [T]
  const int64_t* slots[kMaxLayers] = {};  // per layer [T]; null: token t goes to slot t
  PagedCache keys[kMaxLayers];
  PagedCache values[kMaxLayers];
  const float* key_scales = nullptr;    // [L] or null: stored = x / scale (float8)
  const float* value_scales = nullptr;
};

}  // namespace vllm_dflash
