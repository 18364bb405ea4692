// Where the kernels meet torch: the device, the stream, the launch and its error. The emulation of the tests
// (tests/helpers/cuda_emulation) puts its own launcher here: everything above it is the code that ships.
#pragma once

#include "../checks.h"
#include "grid.cuh"

#if defined(VD_CUDA_EMULATED)
#include "emulated_launch.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace vllm_dflash::cuda {

constexpr Place kPlace = Place::kCuda;

// Launches on torch's current stream of a tensor's device, which is current as long as the launcher lives.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& where) : guard_(where.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Params>
  void operator()(void (*kernel)(Params...), const LaunchShape& shape, const Params&... params) const {
    if (shape.empty()) return;
    const dim3 grid(static_cast<unsigned>(shape.blocks_x), static_cast<unsigned>(shape.blocks_y));
    // clang-format off
    kernel<<<grid, shape.threads, 0, stream_>>>(params...);
    // clang-format on
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace vllm_dflash::cuda

#endif
