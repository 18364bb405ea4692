// Numbers in memory and in registers: vector accesses of up to 16 bytes and conversion from and to float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace vllm_dflash::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;
struct Float8E4M3 {
  __nv_fp8_storage_t bits;
};
struct Float8E5M2 {
  __nv_fp8_storage_t bits;
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<1> {
  using Type = unsigned char;
};

// Wide stores by name: nvcc 13.0 was seen to split plain assignments into words of 4 bytes.
template <typename Word>
__device__ __forceinline__ void write_word(Word* to, const Word& word) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Word) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(Word) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
                 : "memory");
    return;
  }
#endif
  *to = word;
}

// N elements as they lie in memory; one access, at an address that is a multiple of its size.
template <typename T, int N>
struct Packed {
  using Word = typename WordOf<static_cast<int>(sizeof(T)) * N>::Type;
  Word word;

  static __device__ __forceinline__ Packed load(const T* from) { return {*reinterpret_cast<const Word*>(from)}; }
  // For data read once: leaves the cache to what is read again.
  static __device__ __forceinline__ Packed load_once(const T* from) {
    return {__ldcs(reinterpret_cast<const Word*>(from))};
  }
  __device__ __forceinline__ void store(T* to) const { write_word(reinterpret_cast<Word*>(to), word); }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }

// Two floats to two neighbours in memory: the hardware rounds pairs in one instruction. Float8 saturates.
__device__ __forceinline__ void round_pair(float a, float b, float* out) {
  out[0] = a;
  out[1] = b;
}
__device__ __forceinline__ void round_pair(float a, float b, Half* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  memcpy(out, &pair, sizeof(pair));
}
__device__ __forceinline__ void round_pair(float a, float b, BFloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  memcpy(out, &pair, sizeof(pair));
}
__device__ __forceinline__ void round_pair(float a, float b, Float8E4M3* out) {
  const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  memcpy(out, &pair, sizeof(pair));
}
__device__ __forceinline__ void round_pair(float a, float b, Float8E5M2* out) {
  const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E5M2);
  memcpy(out, &pair, sizeof(pair));
}

template <typename T>
__device__ __forceinline__ T round_to(float x) {
  T pair[2];
  round_pair(x, 0.0f, pair);
  return pair[0];
}

template <typename T, int N>
__device__ __forceinline__ void unpack(const Packed<T, N>& from, float (&to)[N]) {
  T values[N];
  memcpy(values, &from.word, sizeof(values));
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(values[i]);
}

template <typename T, int N>
__device__ __forceinline__ Packed<T, N> pack(const float (&from)[N]) {
  static_assert(N % 2 == 0);
  T values[N];
#pragma unroll
  for (int i = 0; i < N; i += 2) round_pair(from[i], from[i + 1], values + i);
  Packed<T, N> to;
  memcpy(&to.word, values, sizeof(values));
  return to;
}

// N floats from consecutive elements at an address that is a multiple of min(16, N * sizeof(T)) bytes.
template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* from, float* to) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(T));
  constexpr int kStep = N < kMost ? N : kMost;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    float part[kStep];
    unpack(Packed<T, kStep>::load(from + i), part);
#pragma unroll
    for (int k = 0; k < kStep; ++k) to[i + k] = part[k];
  }
}

}  // namespace vllm_dflash::cuda
