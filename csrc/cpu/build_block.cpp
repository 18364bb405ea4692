// build_block on the CPU: integer work of a few thousand elements at most per step, so one pass, one thread
// a request at most, no division where positions run on.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "ops.h"

namespace vllm_dflash::cpu {
namespace {

// Long prompts only; a decode step stays on the calling thread.
constexpr int64_t kTokensPerTask = 16384;

// Slots of consecutive tokens: looks a block up once, then counts on until it is full.
class SlotWalk {
 public:
  SlotWalk(const BlockTable& table, int64_t request) : table_(table), request_(request) {}

  int64_t slot(int64_t position) {
    if (position == last_ + 1 && left_ > 0) {
      --left_;
      last_ = position;
      if (slot_ != kPadSlot) ++slot_;
      return slot_;
    }
    slot_ = table_.slot(request_, position);
    left_ = table_.kv_block_size - 1 - position % table_.kv_block_size;
    last_ = position;
    return slot_;
  }

 private:
  const BlockTable& table_;
  int64_t request_;
  int64_t last_ = -2;
  int64_t left_ = 0;
  int64_t slot_ = kPadSlot;
};

void fill(const Ints& out, int64_t from, int64_t value) {
  if (out.data == nullptr) return;
  for (int64_t i = from; i < out.size; ++i) out.set(i, value);
}

void build_request(const BuildBlockParams& p, int64_t request) {
  const int64_t start = p.query_start_loc.get(request);
  const int64_t end = p.query_start_loc.get(request + 1);
  const bool present = end > start;
  int64_t rejected = p.num_rejected.data ? p.num_rejected.get(request) : 0;
  rejected = std::clamp<int64_t>(rejected, 0, end - start);
  const int64_t valid_end = end - rejected;
  // The block starts behind the last valid token; where all are rejected, in place of the first.
  int64_t next = 0;
  if (present) {
    next = valid_end > start ? p.target_positions.get(valid_end - 1) + 1 : p.target_positions.get(start);
  }
  const int64_t state = p.request_index.data ? p.request_index.get(request) : request;
  const bool from_prompt = p.num_sampled.data && p.num_sampled.get(request) <= 0;
  const int64_t anchor = from_prompt ? p.prefill_ids.get(state) : p.anchor_ids.get(state);

  for (int64_t t = start; t < valid_end; ++t) p.context_positions.set(t, p.target_positions.get(t));
  for (int64_t t = valid_end; t < end; ++t) p.context_positions.set(t, 0);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    SlotWalk walk(p.block_tables[g], request);
    int64_t* slots = p.context_slots[g];
    for (int64_t t = start; t < valid_end; ++t) slots[t] = walk.slot(p.target_positions.get(t));
    std::fill(slots + valid_end, slots + end, kPadSlot);
  }

  const int64_t Q = p.num_query_per_request;
  const int64_t first = request * Q;
  for (int64_t q = 0; q < Q; ++q) {
    p.input_ids.set(first + q, q == 0 ? anchor : p.mask_token_id);
    p.query_positions.set(first + q, present ? std::min(next + q, p.max_model_len - 1) : 0);
  }
  for (int64_t g = 0; g < p.num_groups; ++g) {
    SlotWalk walk(p.block_tables[g], request);
    for (int64_t q = 0; q < Q; ++q) {
      const bool writable = present && next + q < p.max_model_len;
      p.query_slots[g][first + q] = writable ? walk.slot(next + q) : kPadSlot;
    }
  }

  const int64_t skipped = p.sample_from_anchor ? 0 : 1;
  for (int64_t k = 0; k < p.num_draft_tokens; ++k) {
    const int64_t i = request * p.num_draft_tokens + k;
    p.sample_indices.set(i, first + skipped + k);
    // From the anchor, query k predicts the token behind it; a mask predicts its own.
    if (p.sample_positions.data) p.sample_positions.set(i, present ? next + k + 1 : 0);
    if (p.sample_requests.data) p.sample_requests.set(i, state);
  }
  p.block_start_loc.set(request, first);
  const int64_t length = p.seq_lens.data ? p.seq_lens.get(request) - rejected : next;
  p.block_seq_lens.set(request, present ? std::min(length + Q, p.max_model_len) : 0);
  if (p.temperature) p.temperature_out[state] = p.temperature[state];
  if (p.seeds.data) p.seeds_out.set(state, p.seeds.get(state));
}

// The data of a CPU tensor can be looked at for free, so bad indices end in an error, not in memory.
void check_data(const BuildBlockParams& p) {
  const Checker check("build_block", Place::kCpu);
  int64_t last = 0;
  for (int64_t i = 0; i <= p.num_requests; ++i) {
    const int64_t value = p.query_start_loc.get(i);
    check.require(value >= last && value <= p.num_context, "query_start_loc[", i, "] is ", value,
                  ", must not decrease nor exceed the ", p.num_context, " target_positions");
    last = value;
  }
  for (int64_t t = 0; t < p.num_context; ++t) {
    const int64_t value = p.target_positions.get(t);
    check.require(value >= 0, "target_positions[", t, "] is ", value, ", must not be negative");
  }
  if (p.request_index.data == nullptr) return;
  for (int64_t i = 0; i < p.num_requests; ++i) {
    const int64_t value = p.request_index.get(i);
    check.require(value >= 0 && value < p.num_states, "request_index[", i, "] is ", value, ", there are ", p.num_states,
                  " request states");
  }
}

}  // namespace

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
      Place::kCpu, anchor_ids, target_positions, query_start_loc, num_rejected, seq_lens, request_index, num_sampled,
      prefill_ids, temperature, seeds, block_tables, kv_block_sizes, num_draft_tokens, mask_token_id, max_model_len,
      sample_from_anchor, input_ids, query_positions, query_slots, query_slot_rows, context_positions, context_slots,
      sample_indices, block_start_loc, block_seq_lens, sample_positions, sample_requests, temperature_out, seeds_out);
  // clang-format on
  check_data(p);
  const int64_t B = p.num_requests;
  if (p.num_context <= kTokensPerTask) {
    for (int64_t request = 0; request < B; ++request) build_request(p, request);
  } else {
    const int64_t grain = std::max<int64_t>(1, B * kTokensPerTask / p.num_context);
    torch::stable::parallel_for(0, B, grain, [&p](int64_t begin, int64_t end) {
      for (int64_t request = begin; request < end; ++request) build_request(p, request);
    });
  }
  const int64_t Q = p.num_query_per_request;
  fill(p.input_ids, B * Q, 0);
  fill(p.query_positions, B * Q, 0);
  fill(p.sample_indices, B * p.num_draft_tokens, 0);
  fill(p.sample_positions, B * p.num_draft_tokens, 0);
  fill(p.sample_requests, B * p.num_draft_tokens, -1);
  fill(p.block_start_loc, B, B * Q);
  fill(p.block_seq_lens, B, 0);
  // Rows before the first and behind the last request belong to none.
  const int64_t first = p.query_start_loc.get(0);
  const int64_t last = p.query_start_loc.get(B);
  for (int64_t t = 0; t < first; ++t) p.context_positions.set(t, 0);
  fill(p.context_positions, last, 0);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    std::fill(p.query_slots[g] + B * Q, p.query_slots[g] + p.query_slots_size, kPadSlot);
    std::fill(p.context_slots[g], p.context_slots[g] + first, kPadSlot);
    std::fill(p.context_slots[g] + last, p.context_slots[g] + p.context_slots_size, kPadSlot);
  }
}

}  // namespace vllm_dflash::cpu
