// Rows of numbers on the CPU: conversion to and from float32, and the arithmetic of the context keys.
// Compiled once per instruction set (function multiversioning), so that one wheel is fast everywhere.
#pragma once

#include <cstdint>

#include "../params.h"

namespace vllm_dflash::cpu {

int64_t element_size(Float dtype);

// out[0:n] = in[0:n] as float32.
void load_row(Float dtype, const void* in, float* out, int64_t n);

// out[0:n] = in[0:n] rounded to dtype (to nearest even); float8 saturates.
void store_row(Float dtype, const float* in, void* out, int64_t n);

// out[0:n] = hidden[0:n] + residual[0:n], added in float32, rounded once.
void add_row(Float dtype, const void* hidden, const void* residual, void* out, int64_t n);

void scale_row(float* x, float factor, int64_t n);
void divide_row(float* x, float divisor, int64_t n);

// RMS norm and rotary embedding of `heads` heads of `head_size` elements, in place.
//   weight [head_size]; cos_sin [rotary_dim], the cosines first.
void norm_rope_row(float* x, int64_t heads, int64_t head_size, const float* weight, float eps, const float* cos_sin,
                   int64_t rotary_dim, bool is_neox);

}  // namespace vllm_dflash::cpu
