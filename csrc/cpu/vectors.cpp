#include "vectors.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Float8_e5m2.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

// GNU ifuncs pick the widest clone when the library is loaded; elsewhere the compiler's default must do.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VD_CLONES
#endif

namespace vllm_dflash::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Float8_e4m3fn;
using torch::headeronly::Float8_e5m2;
using torch::headeronly::Half;

// bfloat16 by integer arithmetic: branch-free, so it becomes vector code in every clone.
inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

VD_CLONES void load_bf16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
}

VD_CLONES void store_bf16(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
}

VD_CLONES void add_bf16(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(from_bf16(a[i]) + from_bf16(b[i]));
}

VD_CLONES void add_f32(const float* a, const float* b, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

VD_CLONES void load_f16(const Half* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

VD_CLONES void store_f16(const float* in, Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Half>(in[i]);
}

template <typename T>
void store_float8(const float* in, T* out, int64_t n, float limit) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(std::clamp(in[i], -limit, limit));
}

VD_CLONES float sum_of_squares(const float* x, int64_t n) {
  // Sixteen partial sums: the compiler may not reorder a float sum by itself.
  float parts[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) parts[j] += x[i + j] * x[i + j];
  }
  float sum = 0;
  for (; i < n; ++i) sum += x[i] * x[i];
  for (float part : parts) sum += part;
  return sum;
}

VD_CLONES void multiply(float* x, const float* weight, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * factor * weight[i];
}

VD_CLONES void rotate_neox(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

VD_CLONES void rotate_interleaved(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i];
    const float b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

int64_t element_size(Float dtype) {
  switch (dtype) {
    case Float::kFloat32:
      return 4;
    case Float::kFloat16:
    case Float::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

void load_row(Float dtype, const void* in, float* out, int64_t n) {
  switch (dtype) {
    case Float::kBFloat16:
      return load_bf16(static_cast<const uint16_t*>(in), out, n);
    case Float::kFloat16:
      return load_f16(static_cast<const Half*>(in), out, n);
    default:
      std::memcpy(out, in, n * sizeof(float));
  }
}

void store_row(Float dtype, const float* in, void* out, int64_t n) {
  switch (dtype) {
    case Float::kBFloat16:
      return store_bf16(in, static_cast<uint16_t*>(out), n);
    case Float::kFloat16:
      return store_f16(in, static_cast<Half*>(out), n);
    case Float::kFloat8E4M3:
      return store_float8(in, static_cast<Float8_e4m3fn*>(out), n, 448.0f);
    case Float::kFloat8E5M2:
      return store_float8(in, static_cast<Float8_e5m2*>(out), n, 57344.0f);
    case Float::kFloat32:
      std::memcpy(out, in, n * sizeof(float));
  }
}

void add_row(Float dtype, const void* hidden, const void* residual, void* out, int64_t n) {
  switch (dtype) {
    case Float::kBFloat16:
      return add_bf16(static_cast<const uint16_t*>(hidden), static_cast<const uint16_t*>(residual),
                      static_cast<uint16_t*>(out), n);
    case Float::kFloat16: {
      constexpr int64_t kChunk = 256;
      float a[kChunk];
      float b[kChunk];
      for (int64_t i = 0; i < n; i += kChunk) {
        const int64_t m = std::min(kChunk, n - i);
        load_f16(static_cast<const Half*>(hidden) + i, a, m);
        load_f16(static_cast<const Half*>(residual) + i, b, m);
        add_f32(a, b, a, m);
        store_f16(a, static_cast<Half*>(out) + i, m);
      }
      return;
    }
    default:
      add_f32(static_cast<const float*>(hidden), static_cast<const float*>(residual), static_cast<float*>(out), n);
  }
}

void scale_row(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void divide_row(float* x, float divisor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

void norm_rope_row(float* x, int64_t heads, int64_t head_size, const float* weight, float eps, const float* cos_sin,
                   int64_t rotary_dim, bool is_neox) {
  const int64_t half = rotary_dim / 2;
  for (int64_t head = 0; head < heads; ++head, x += head_size) {
    const float mean = sum_of_squares(x, head_size) / static_cast<float>(head_size);
    multiply(x, weight, 1.0f / std::sqrt(mean + eps), head_size);
    (is_neox ? rotate_neox : rotate_interleaved)(x, cos_sin, cos_sin + half, half);
  }
}

}  // namespace vllm_dflash::cpu
