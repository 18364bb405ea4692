// The ops on CPU tensors; argument lists as in csrc/bindings.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace vllm_dflash::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void build_block(Tensor anchor_ids, Tensor target_positions, Tensor query_start_loc, OptionalTensor num_rejected,
                 OptionalTensor seq_lens, OptionalTensor request_index, OptionalTensor num_sampled,
                 OptionalTensor prefill_ids, OptionalTensor temperature, OptionalTensor seeds,
                 std::vector<Tensor> block_tables, std::vector<int64_t> kv_block_sizes, int64_t num_draft_tokens,
                 int64_t mask_token_id, int64_t max_model_len, bool sample_from_anchor, Tensor input_ids,
                 Tensor query_positions, Tensor query_slots, std::vector<int64_t> query_slot_rows,
                 Tensor context_positions, Tensor context_slots, Tensor sample_indices, Tensor block_start_loc,
                 Tensor block_seq_lens, OptionalTensor sample_positions, OptionalTensor sample_requests,
                 OptionalTensor temperature_out, OptionalTensor seeds_out);

void tap_hidden_states(Tensor features, Tensor hidden, OptionalTensor residual, int64_t column);

void store_context_kv(Tensor kv, Tensor k_norm_weights, double eps, Tensor positions, Tensor cos_sin_cache,
                      bool is_neox, double value_scale, std::vector<Tensor> slots, std::vector<Tensor> key_caches,
                      std::vector<Tensor> value_caches, OptionalTensor key_scales, OptionalTensor value_scales);

}  // namespace vllm_dflash::cpu
