"""The ops' schemas, for the fallbacks that are registered from Python.

The extension registers the same strings from C++ (``csrc/bindings.cpp``); a test compares the two.
Fallbacks need them because ``torch.ops.vllm_dflash.*`` must exist, and trace, without the extension.
"""

from __future__ import annotations

NAMESPACE = "vllm_dflash"

SCHEMAS = {
    "build_block": (
        "(Tensor anchor_ids, Tensor target_positions, Tensor query_start_loc, Tensor? num_rejected, "
        "Tensor? seq_lens, Tensor? request_index, Tensor? num_sampled, Tensor? prefill_ids, "
        "Tensor? temperature, Tensor? seeds, Tensor[] block_tables, int[] kv_block_sizes, "
        "int num_draft_tokens, int mask_token_id, int max_model_len, bool sample_from_anchor, "
        "Tensor(a!) input_ids, Tensor(b!) query_positions, Tensor(c!) query_slots, int[] query_slot_rows, "
        "Tensor(d!) context_positions, Tensor(e!) context_slots, Tensor(f!) sample_indices, "
        "Tensor(g!) block_start_loc, Tensor(h!) block_seq_lens, Tensor(i!)? sample_positions, "
        "Tensor(j!)? sample_requests, Tensor(k!)? temperature_out, Tensor(l!)? seeds_out) -> ()"
    ),
    "tap_hidden_states": (
        "(Tensor(a!) features, Tensor hidden, Tensor? residual, int column) -> ()"
    ),
    "store_context_kv": (
        "(Tensor kv, Tensor k_norm_weights, float eps, Tensor positions, Tensor cos_sin_cache, "
        "bool is_neox, float value_scale, Tensor[] slots, Tensor(a!)[] key_caches, "
        "Tensor(b!)[] value_caches, Tensor? key_scales, Tensor? value_scales) -> ()"
    ),
}
