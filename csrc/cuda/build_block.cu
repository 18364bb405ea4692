#include "build_block.cuh"
#include "launch.h"
#include "ops.h"

namespace vllm_dflash::cuda {

// clang-format off
void build_block(Tensor anchor_ids, Tensor target_positions, Tensor query_start_loc, OptionalTensor num_rejected,
                 OptionalTensor seq_lens, OptionalTensor request_index, OptionalTensor num_sampled,
                 OptionalTensor prefill_ids, OptionalTensor temperature, OptionalTensor seeds,
                 std::vector<Tensor> block_tables, std::vector<int64_t> kv_block_sizes, int64_t num_draft_tokens,
                 int64_t mask_token_id, int64_t max_model_len, bool sample_from_anchor, Tensor input_ids,
                 Tensor query_positions, Tensor query_slots, std::vector<int64_t> query_slot_rows,
                 Tensor context_positions, Tensor context_slots, Tensor sample_indices, Tensor block_start_loc,
                 Tensor block_seq_lens, OptionalTensor sample_positions, OptionalTensor sample_requests,
                 OptionalTensor temperature_out, OptionalTensor seeds_out) {
  const BuildBlockParams p = check_build_block(
      kPlace, anchor_ids, target_positions, query_start_loc, num_rejected, seq_lens, request_index, num_sampled,
      prefill_ids, temperature, seeds, block_tables, kv_block_sizes, num_draft_tokens, mask_token_id, max_model_len,
      sample_from_anchor, input_ids, query_positions, query_slots, query_slot_rows, context_positions, context_slots,
      sample_indices, block_start_loc, block_seq_lens, sample_positions, sample_requests, temperature_out, seeds_out);
  // clang-format on
  const Checker check("build_block", kPlace);
  const int64_t largest = std::max(build_block_query_size(p), build_block_context_size(p));
  check.require(largest < kMaxCount, "an output has ", largest, " elements, supported are less than ", kMaxCount);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    check.require(kv_block_sizes[g] < kMaxCount, "kv_block_sizes[", g, "] is ", kv_block_sizes[g]);
  }
  launch_build_block(p, Launcher(target_positions));
}

}  // namespace vllm_dflash::cuda
