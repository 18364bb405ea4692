// The launcher of csrc/cuda/launch.h for the host: same interface, CPU tensors, no stream.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../../../csrc/checks.h"
#include "../../../csrc/cuda/grid.cuh"

namespace cuda_emulation {
void describe_launch(const Grid& grid, const std::string& kernel);
}

namespace vllm_dflash::cuda {

constexpr Place kPlace = Place::kCpu;

class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor&) {}

  template <typename... Params>
  void operator()(void (*kernel)(Params...), const LaunchShape& shape, const Params&... params) const {
    static_assert((sizeof(Params) + ...) <= 4096, "more than a kernel takes as parameters");
    if (shape.empty()) return;
    const cuda_emulation::Grid grid{shape.blocks_x, shape.blocks_y, shape.threads};
    // Kernels of one op differ in their parameters where they differ in kind.
    cuda_emulation::describe_launch(grid, sizeof...(Params) == 1 ? "one parameter" : "more parameters");
    cuda_emulation::run(grid, [&] { kernel(params...); });
  }
};

}  // namespace vllm_dflash::cuda
