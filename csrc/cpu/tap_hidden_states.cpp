// tap_hidden_states on the CPU: one pass over the rows.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "ops.h"
#include "vectors.h"

namespace vllm_dflash::cpu {

void tap_hidden_states(Tensor features, Tensor hidden, OptionalTensor residual, int64_t column) {
  const TapParams p = check_tap_hidden_states(Place::kCpu, features, hidden, residual, column);
  if (p.num_tokens == 0 || p.hidden_size == 0) return;
  const int64_t size = element_size(p.dtype);
  const auto* in = static_cast<const char*>(p.hidden);
  const auto* other = static_cast<const char*>(p.residual);
  auto* out = static_cast<char*>(p.features);
  // 32K elements a task: below that a thread costs more than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / p.hidden_size);
  torch::stable::parallel_for(0, p.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* hidden_row = in + t * p.hidden_stride * size;
      char* out_row = out + t * p.features_stride * size;
      if (other == nullptr) {
        std::memcpy(out_row, hidden_row, p.hidden_size * size);
      } else {
        add_row(p.dtype, hidden_row, other + t * p.residual_stride * size, out_row, p.hidden_size);
      }
    }
  });
}

}  // namespace vllm_dflash::cpu
