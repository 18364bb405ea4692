// Kernels with the mistakes that the emulator must find.
#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace {

__global__ void sum_kernel(int* out) {
  int sum = static_cast<int>(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0) total += sum;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

__global__ void missing_barrier_kernel(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = static_cast<int>(blockIdx.x) + 1;
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void skipped_barrier_kernel() {
  if (threadIdx.x >= 32) __shfl_xor_sync(0xffffffffu, 0, threadIdx.x == 40 ? 2 : 1);
  __syncthreads();
}

__global__ void waits_forever_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x == 40) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void left_lane_kernel() {
  if (threadIdx.x == 1) return;
  __shfl_xor_sync(0xffffffffu, 0, 1);
}

__global__ void misaligned_kernel() {
  alignas(16) static char memory[64];
  __ldcs(reinterpret_cast<const uint4*>(memory + 4));
}

std::string said;

}  // namespace

// What the emulator says about a kernel, empty if nothing; `out` has 128 elements.
extern "C" const char* vd_emulation_selftest(int kernel, int* out) {
  said.clear();
  try {
    cuda_emulation::run({2, 1, 64}, [=] {
      switch (kernel) {
        case 0:
          return sum_kernel(out);
        case 1:
          return missing_barrier_kernel(out);
        case 2:
          return skipped_barrier_kernel();
        case 3:
          return waits_forever_kernel();
        case 4:
          return left_lane_kernel();
        default:
          return misaligned_kernel();
      }
    });
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
