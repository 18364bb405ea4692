// Stands in for CUDA's header of this name when the kernels are compiled for the host (VD_CUDA_EMULATED); included
// before everything else. Kernels become plain functions that emulator.cpp calls once a thread.
#pragma once

#include <cstdint>
#include <cstring>

// One block runs at a time, so what its threads share is static. Defined first: CUDA's own headers only fill gaps.
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>

#include "emulator.h"

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

inline void __syncthreads() { cuda_emulation::sync_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::exchange(mask, 0, "__syncwarp", [](int) { return 0; });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = cuda_emulation::exchange(mask, bits, "__shfl_xor_sync", [=](int lane) { return lane ^ lane_mask; });
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int __any_sync(unsigned mask, int predicate) {
  return cuda_emulation::vote(mask, predicate != 0, "__any_sync") != 0;
}

template <typename T>
T __ldcs(const T* from) {
  cuda_emulation::require_aligned(from, sizeof(T));
  return *from;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
