// build_block on the GPU: one launch, one thread an element of the outputs.
//
// blockIdx.y is the KV-cache group; group 0 also writes what the groups share. Along x the first blocks cover the
// query outputs, the others the context outputs, each including its padding, so that the grid depends on sizes
// only and a long prompt beside many decoding requests needs no thread that idles. No output may overlap an input:
// blocks run in any order.
#pragma once

#include <cuda_runtime.h>

#include "grid.cuh"

namespace vllm_dflash::cuda {

constexpr int kBuildThreads = 256;
// Requests whose token ranges a thread block holds in shared memory at a time.
constexpr int kBuildRequests = 1024;

inline int64_t build_block_query_size(const BuildBlockParams& p) {
  int64_t most = p.query_slots_size;
  for (const Ints* out : {&p.input_ids, &p.query_positions, &p.sample_indices, &p.block_start_loc, &p.block_seq_lens,
                          &p.sample_positions, &p.sample_requests}) {
    most = out->size > most ? out->size : most;
  }
  return most;
}

inline int64_t build_block_context_size(const BuildBlockParams& p) {
  return p.context_positions.size > p.context_slots_size ? p.context_positions.size : p.context_slots_size;
}

inline LaunchShape build_block_shape(const BuildBlockParams& p) {
  LaunchShape shape;
  shape.threads = kBuildThreads;
  shape.blocks_x =
      ceil_div(build_block_query_size(p), kBuildThreads) + ceil_div(build_block_context_size(p), kBuildThreads);
  shape.blocks_y = p.num_groups;
  return shape;
}

// As BlockTable::slot, in 32 bits where it divides.
__device__ __forceinline__ int64_t find_slot(const BlockTable& table, int64_t request, int64_t position) {
  if (position < 0 || position > 0xffffffffLL) return kPadSlot;
  const auto narrow = static_cast<unsigned>(position);
  const auto size = static_cast<unsigned>(table.kv_block_size);
  const unsigned block = narrow / size;
  if (block >= table.width) return kPadSlot;
  const int64_t id = table.data[request * table.row_stride + block];
  return id <= kNullBlock ? kPadSlot : id * size + (narrow - block * size);
}

// Context tokens [start, end) of a request in this step; those from valid_end on are rejected.
struct TokenRange {
  int start, end, valid_end;
};

__device__ __forceinline__ TokenRange read_range(const BuildBlockParams& p, int64_t request) {
  const auto start = static_cast<int>(p.query_start_loc.get(request));
  const auto end = static_cast<int>(p.query_start_loc.get(request + 1));
  const int64_t rejected = p.num_rejected.data ? p.num_rejected.get(request) : 0;
  const int present = end > start ? end - start : 0;
  const int cut = rejected < 0 ? 0 : rejected > present ? present : static_cast<int>(rejected);
  return {start, end, end - cut};
}

// Position of the block's first token: behind the last valid token; where all are rejected, in place of the first.
__device__ __forceinline__ int64_t next_position(const BuildBlockParams& p, const TokenRange& range) {
  const bool any_valid = range.valid_end > range.start;
  const int64_t token = any_valid ? range.valid_end - 1 : range.start;
  if (token < 0 || token >= p.num_context) return 0;
  return p.target_positions.get(token) + (any_valid ? 1 : 0);
}

__device__ __forceinline__ void set_if_inside(const Ints& out, int64_t i, int64_t value) {
  if (i < out.size) out.set(i, value);
}

// What holds once a request; run by the thread of its first query.
__device__ __forceinline__ void write_request(const BuildBlockParams& p, int64_t request, int64_t state,
                                              const TokenRange& range, int64_t next) {
  const int64_t Q = p.num_query_per_request;
  p.block_start_loc.set(request, request * Q);
  int64_t length = 0;
  if (range.end > range.start) {
    length = (p.seq_lens.data ? p.seq_lens.get(request) - (range.end - range.valid_end) : next) + Q;
    length = length < p.max_model_len ? length : p.max_model_len;
  }
  p.block_seq_lens.set(request, length);
  if (state < 0 || state >= p.num_states) return;
  if (p.temperature) p.temperature_out[state] = p.temperature[state];
  if (p.seeds.data) p.seeds_out.set(state, p.seeds.get(state));
}

// Token that the block of a request starts with. A state outside the tensors would fault the whole context, long
// after the call that is to blame; it drafts from token 0 instead.
__device__ __forceinline__ int64_t read_anchor(const BuildBlockParams& p, int64_t request, int64_t state) {
  if (state < 0 || state >= p.num_states) return 0;
  const bool from_prompt = p.num_sampled.data && p.num_sampled.get(request) <= 0;
  return from_prompt ? p.prefill_ids.get(state) : p.anchor_ids.get(state);
}

__device__ __forceinline__ void write_query(const BuildBlockParams& p, int group, int64_t i) {
  const auto Q = static_cast<unsigned>(p.num_query_per_request);
  const auto request = static_cast<unsigned>(i) / Q;
  const unsigned q = static_cast<unsigned>(i) - request * Q;
  const TokenRange range = read_range(p, request);
  const bool present = range.end > range.start;
  const int64_t next = present ? next_position(p, range) : 0;
  const int64_t position = next + q;

  const bool writable = present && position < p.max_model_len;
  p.query_slots[group][i] = writable ? find_slot(p.block_tables[group], request, position) : kPadSlot;
  if (group != 0) return;

  const int64_t state = p.request_index.data ? p.request_index.get(request) : request;
  p.input_ids.set(i, q == 0 ? read_anchor(p, request, state) : p.mask_token_id);
  const int64_t shown = position < p.max_model_len ? position : p.max_model_len - 1;
  p.query_positions.set(i, present ? shown : 0);

  const unsigned skipped = p.sample_from_anchor ? 0 : 1;
  if (q >= skipped) {
    const int64_t sample = static_cast<int64_t>(request) * p.num_draft_tokens + (q - skipped);
    p.sample_indices.set(sample, i);
    // From the anchor, query k predicts the token behind it; a mask predicts its own.
    if (p.sample_positions.data) p.sample_positions.set(sample, present ? position + 1 - skipped : 0);
    if (p.sample_requests.data) p.sample_requests.set(sample, state);
  }
  if (q == 0) write_request(p, request, state, range, next);
}

// Element i of the query outputs of one group, or its padding.
__device__ __forceinline__ void build_query_element(const BuildBlockParams& p, int group, int64_t i) {
  const int64_t B = p.num_requests;
  const int64_t num_queries = B * p.num_query_per_request;
  if (i < num_queries) {
    write_query(p, group, i);
  } else if (i < p.query_slots_size) {
    p.query_slots[group][i] = kPadSlot;
  }
  if (group != 0) return;
  if (i >= num_queries) {
    set_if_inside(p.input_ids, i, 0);
    set_if_inside(p.query_positions, i, 0);
  }
  if (i >= B * p.num_draft_tokens) {
    set_if_inside(p.sample_indices, i, 0);
    set_if_inside(p.sample_positions, i, 0);
    set_if_inside(p.sample_requests, i, -1);
  }
  if (i >= B) {
    set_if_inside(p.block_start_loc, i, num_queries);
    set_if_inside(p.block_seq_lens, i, 0);
  }
}

// Element t of the context outputs of one group, or its padding; called by all threads of a block.
__device__ __forceinline__ void build_context_element(const BuildBlockParams& p, int group, int64_t t, int64_t last_t) {
  __shared__ int starts[kBuildRequests];
  __shared__ int ends[kBuildRequests];
  __shared__ int valid_ends[kBuildRequests];

  const bool in_batch = t < p.num_context;
  // Asked for before the search, which it would otherwise wait behind.
  int64_t position = in_batch ? p.target_positions.get(t) : 0;
  int64_t owner = -1;
  bool valid = false;
  // The token's request is the first that ends behind it. Nothing to look for in blocks of padding only.
  const bool block_in_batch = t - static_cast<int64_t>(threadIdx.x) < p.num_context;
  for (int64_t base = 0; block_in_batch && base < p.num_requests; base += kBuildRequests) {
    const int64_t left = p.num_requests - base;
    const int count = left < kBuildRequests ? static_cast<int>(left) : kBuildRequests;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kBuildThreads) {
      const TokenRange range = read_range(p, base + i);
      starts[i] = range.start;
      ends[i] = range.end;
      valid_ends[i] = range.valid_end;
    }
    __syncthreads();
    if (in_batch && owner < 0 && t < ends[count - 1]) {
      int low = 0;
      int high = count - 1;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (t < ends[middle]) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      owner = base + low;
      valid = t >= starts[low] && t < valid_ends[low];
    }
    const bool covered = last_t < ends[count - 1];
    if (covered) break;
    __syncthreads();  // before the next requests overwrite these
  }

  if (!valid) position = 0;
  if (group == 0) set_if_inside(p.context_positions, t, position);
  if (t < p.context_slots_size) {
    p.context_slots[group][t] = valid ? find_slot(p.block_tables[group], owner, position) : kPadSlot;
  }
}

static __global__ void __launch_bounds__(kBuildThreads)
    build_block_kernel(const __grid_constant__ BuildBlockParams p, unsigned num_query_blocks) {
  const int group = static_cast<int>(blockIdx.y);
  if (blockIdx.x < num_query_blocks) {
    build_query_element(p, group, static_cast<int64_t>(blockIdx.x) * kBuildThreads + threadIdx.x);
  } else {
    const int64_t first = static_cast<int64_t>(blockIdx.x - num_query_blocks) * kBuildThreads;
    const int64_t last = first + kBuildThreads < p.num_context ? first + kBuildThreads - 1 : p.num_context - 1;
    build_context_element(p, group, first + threadIdx.x, last);
  }
}

template <typename Launch>
void launch_build_block(const BuildBlockParams& p, const Launch& launch) {
  const auto num_query_blocks = static_cast<unsigned>(ceil_div(build_block_query_size(p), kBuildThreads));
  launch(build_block_kernel, build_block_shape(p), p, num_query_blocks);
}

}  // namespace vllm_dflash::cuda
