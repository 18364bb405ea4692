#include "launch.h"
#include "ops.h"
#include "tap_hidden_states.cuh"

namespace vllm_dflash::cuda {

void tap_hidden_states(Tensor features, Tensor hidden, OptionalTensor residual, int64_t column) {
  const TapParams p = check_tap_hidden_states(kPlace, features, hidden, residual, column);
  if (p.num_tokens == 0 || p.hidden_size == 0) return;
  const Checker check("tap_hidden_states", kPlace);
  check.require(p.num_tokens * ceil_div(p.hidden_size, 32) < kMaxCount, "hidden has ", p.num_tokens, " x ",
                p.hidden_size, " elements, more than one launch takes");
  launch_tap_hidden_states(p, Launcher(hidden));
}

}  // namespace vllm_dflash::cuda
