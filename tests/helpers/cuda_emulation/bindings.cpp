// torch.ops.vllm_dflash_emulated.*: the CUDA ops on CPU tensors. emulation.py defines the schemas.
#include <torch/csrc/stable/library.h>

#include "../../../csrc/cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(vllm_dflash_emulated, CPU, m) {
  m.impl("build_block", TORCH_BOX(&vllm_dflash::cuda::build_block));
  m.impl("tap_hidden_states", TORCH_BOX(&vllm_dflash::cuda::tap_hidden_states));
  m.impl("store_context_kv", TORCH_BOX(&vllm_dflash::cuda::store_context_kv));
}
