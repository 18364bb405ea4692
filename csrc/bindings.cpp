// vllm_dflash._C: the schemas of every op, and the CPU kernels. CUDA kernels live in _C_cuda, so that
// importing this one needs no CUDA library. docs/dev/architecture.md says what each op is for.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

// Kept equal to vllm_dflash/ops/schemas.py (a test compares them).
STABLE_TORCH_LIBRARY(vllm_dflash, m) {
  // Mask-token blocks of a batch: query ids, positions, cache slots, sample indices, and the context's slots.
  m.def(
      "build_block(Tensor anchor_ids, Tensor target_positions, Tensor query_start_loc, Tensor? num_rejected, "
      "Tensor? seq_lens, Tensor? request_index, Tensor? num_sampled, Tensor? prefill_ids, "
      "Tensor? temperature, Tensor? seeds, Tensor[] block_tables, int[] kv_block_sizes, "
      "int num_draft_tokens, int mask_token_id, int max_model_len, bool sample_from_anchor, "
      "Tensor(a!) input_ids, Tensor(b!) query_positions, Tensor(c!) query_slots, int[] query_slot_rows, "
      "Tensor(d!) context_positions, Tensor(e!) context_slots, Tensor(f!) sample_indices, "
      "Tensor(g!) block_start_loc, Tensor(h!) block_seq_lens, Tensor(i!)? sample_positions, "
      "Tensor(j!)? sample_requests, Tensor(k!)? temperature_out, Tensor(l!)? seeds_out) -> ()");
  // A verifier layer's hidden states (+ residual) into its columns of the feature buffer.
  m.def("tap_hidden_states(Tensor(a!) features, Tensor hidden, Tensor? residual, int column) -> ()");
  // K norm, rotary embedding and paged-cache writes of the context, for all draft layers.
  m.def(
      "store_context_kv(Tensor kv, Tensor k_norm_weights, float eps, Tensor positions, Tensor cos_sin_cache, "
      "bool is_neox, float value_scale, Tensor[] slots, Tensor(a!)[] key_caches, "
      "Tensor(b!)[] value_caches, Tensor? key_scales, Tensor? value_scales) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dflash, CPU, m) {
  m.impl("build_block", TORCH_BOX(&vllm_dflash::cpu::build_block));
  m.impl("tap_hidden_states", TORCH_BOX(&vllm_dflash::cpu::tap_hidden_states));
  m.impl("store_context_kv", TORCH_BOX(&vllm_dflash::cpu::store_context_kv));
}

// For `import vllm_dflash._C`; the plugin loads it as a library, so it also builds where Python.h is missing.
#if __has_include(<Python.h>)
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
