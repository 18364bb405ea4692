// Grid arithmetic shared by the kernels' launch helpers; host and device, no torch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace vllm_dflash::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The kernels count tokens, rows and blocks in 32 bits: 64-bit division costs ten times as much, and no batch
// comes near. Launch helpers refuse more.
constexpr int64_t kMaxCount = int64_t{1} << 31;

struct LaunchShape {
  int64_t blocks_x = 0;
  int64_t blocks_y = 1;
  int threads = 0;

  bool empty() const { return blocks_x == 0 || blocks_y == 0; }
};

VD_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Smallest e with 2^e >= n.
VD_HOST_DEVICE int log2_ceil(int64_t n) {
  int bits = 0;
  while ((int64_t{1} << bits) < n) ++bits;
  return bits;
}

VD_HOST_DEVICE bool is_multiple(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace vllm_dflash::cuda
