// tap_hidden_states on the GPU: features = hidden (+ residual), limited by memory bandwidth.
//
// A thread block covers a chunk of columns in kRows rows; a thread has one vector of each row, all asked for
// before the first is used. The block is as wide as makes the chunks of a row equal (224 threads for the 672
// vectors of 5376 bfloat16 columns), so that few threads idle.
#pragma once

#include "grid.cuh"
#include "numbers.cuh"

namespace vllm_dflash::cuda {

constexpr int kTapMaxThreads = 256;
// Rows a thread takes from many tokens; with few, one row each spreads them over more of the GPU.
constexpr int kTapRows = 4;
constexpr int64_t kTapManyBlocks = 1024;

struct TapShape {
  int vector_size = 1;  // elements of an access
  int rows = 1;         // of a thread
  unsigned num_chunks = 1;
  unsigned vectors_per_row = 0;
  LaunchShape launch;
};

inline TapShape tap_shape(const TapParams& p, int element_size) {
  const int vector_size = 16 / element_size;
  const auto aligned = [&](const void* data, int64_t stride) {
    return is_multiple(data, 16) && (p.num_tokens == 1 || stride % vector_size == 0);
  };
  TapShape shape;
  if (p.hidden_size >= vector_size && aligned(p.hidden, p.hidden_stride) && aligned(p.features, p.features_stride) &&
      (p.residual == nullptr || aligned(p.residual, p.residual_stride))) {
    shape.vector_size = vector_size;
  }
  const int64_t vectors = p.hidden_size / shape.vector_size;
  const int64_t chunks = ceil_div(vectors, kTapMaxThreads);
  shape.vectors_per_row = static_cast<unsigned>(vectors);
  shape.num_chunks = static_cast<unsigned>(chunks);
  shape.rows = ceil_div(p.num_tokens, kTapRows) * chunks >= kTapManyBlocks ? kTapRows : 1;
  shape.launch.threads = static_cast<int>(ceil_div(ceil_div(vectors, chunks), kWarpSize) * kWarpSize);
  shape.launch.blocks_x = ceil_div(p.num_tokens, shape.rows) * chunks;
  return shape;
}

template <typename T, int kVector>
__device__ __forceinline__ Packed<T, kVector> add_packed(const Packed<T, kVector>& a, const Packed<T, kVector>& b) {
  float x[kVector];
  float y[kVector];
  unpack(a, x);
  unpack(b, y);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] += y[i];
  if constexpr (kVector == 1) {
    const T rounded = round_to<T>(x[0]);
    Packed<T, 1> out;
    memcpy(&out.word, &rounded, sizeof(rounded));
    return out;
  } else {
    return pack<T>(x);
  }
}

template <typename T, int kVector, int kRows>
__global__ void __launch_bounds__(kTapMaxThreads)
    tap_hidden_states_kernel(const __grid_constant__ TapParams p, unsigned num_chunks, unsigned vectors_per_row) {
  using Vector = Packed<T, kVector>;
  const unsigned row_block = blockIdx.x / num_chunks;
  const unsigned chunk = blockIdx.x - row_block * num_chunks;
  const unsigned vector = chunk * blockDim.x + threadIdx.x;
  const int64_t first_row = static_cast<int64_t>(row_block) * kRows;
  const int64_t left = p.num_tokens - first_row;
  const int rows = left < kRows ? static_cast<int>(left) : kRows;
  const T* hidden = static_cast<const T*>(p.hidden) + first_row * p.hidden_stride;
  const T* residual = static_cast<const T*>(p.residual) + first_row * p.residual_stride;
  T* features = static_cast<T*>(p.features) + first_row * p.features_stride;

  if (vector < vectors_per_row) {
    const int64_t column = static_cast<int64_t>(vector) * kVector;
    Vector values[kRows];
    Vector others[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) values[r] = Vector::load(hidden + r * p.hidden_stride + column);
    }
    if (p.residual != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) others[r] = Vector::load(residual + r * p.residual_stride + column);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) values[r] = add_packed<T, kVector>(values[r], others[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) values[r].store(features + r * p.features_stride + column);
    }
  }

  // Columns behind the last whole vector, fewer than one vector's: the first threads of the row.
  const int64_t column = static_cast<int64_t>(vectors_per_row) * kVector + threadIdx.x;
  if (chunk == 0 && column < p.hidden_size) {
    for (int r = 0; r < rows; ++r) {
      auto value = Packed<T, 1>::load(hidden + r * p.hidden_stride + column);
      if (p.residual != nullptr) {
        value = add_packed<T, 1>(value, Packed<T, 1>::load(residual + r * p.residual_stride + column));
      }
      value.store(features + r * p.features_stride + column);
    }
  }
}

template <typename T, typename Launch>
void launch_tap_of(const TapParams& p, const Launch& launch) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const TapShape shape = tap_shape(p, sizeof(T));
  const auto kernel =
      shape.vector_size == 1
          ? (shape.rows == 1 ? tap_hidden_states_kernel<T, 1, 1> : tap_hidden_states_kernel<T, 1, kTapRows>)
          : (shape.rows == 1 ? tap_hidden_states_kernel<T, kVector, 1>
                             : tap_hidden_states_kernel<T, kVector, kTapRows>);
  launch(kernel, shape.launch, p, shape.num_chunks, shape.vectors_per_row);
}

template <typename Launch>
void launch_tap_hidden_states(const TapParams& p, const Launch& launch) {
  switch (p.dtype) {
    case Float::kFloat16:
      return launch_tap_of<Half>(p, launch);
    case Float::kBFloat16:
      return launch_tap_of<BFloat16>(p, launch);
    default:
      return launch_tap_of<float>(p, launch);
  }
}

}  // namespace vllm_dflash::cuda
