#include "launch.h"
#include "ops.h"
#include "store_context_kv.cuh"

namespace vllm_dflash::cuda {

void store_context_kv(Tensor kv, Tensor k_norm_weights, double eps, Tensor positions, Tensor cos_sin_cache,
                      bool is_neox, double value_scale, std::vector<Tensor> slots, std::vector<Tensor> key_caches,
                      std::vector<Tensor> value_caches, OptionalTensor key_scales, OptionalTensor value_scales) {
  const StoreContextKvParams p =
      check_store_context_kv(kPlace, kv, k_norm_weights, eps, positions, cos_sin_cache, is_neox, value_scale, slots,
                             key_caches, value_caches, key_scales, value_scales);
  if (p.num_tokens == 0 || p.num_heads == 0 || p.head_size == 0 || p.num_blocks == 0) return;
  const Checker check("store_context_kv", kPlace);
  check.require(p.num_blocks * p.kv_block_size < kMaxCount, "the caches have ", p.num_blocks * p.kv_block_size,
                " slots, supported are less than ", kMaxCount);
  check.require(p.num_tokens * p.num_layers * p.num_heads < kMaxCount && p.num_heads * p.head_size < kMaxCount,
                "kv has ", p.num_tokens, " tokens of ", p.num_layers, " layers and ", p.num_heads,
                " heads, more than one launch takes");
  const Launcher launch(kv);
  switch (p.dtype) {
    case Float::kFloat16:
      return launch_store_context_kv<Half>(p, launch);
    case Float::kBFloat16:
      return launch_store_context_kv<BFloat16>(p, launch);
    default:
      return launch_store_context_kv<float>(p, launch);
  }
}

}  // namespace vllm_dflash::cuda
