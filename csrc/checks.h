// Argument checks of the ops, shared by the CPU and the CUDA kernels: bad shapes, dtypes and devices end
// in an error that names the op, the argument and the value. Reads metadata only, never the data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "params.h"

namespace vllm_dflash {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where the kernel that runs the checks computes.
enum class Place { kCpu, kCuda };

class Checker {
 public:
  Checker(const char* op, Place place) : op_(op), place_(place) {}

  template <typename... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream message;
    message << "vllm_dflash::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // Every tensor must be on one device: the first one seen decides.
  void device(const Tensor& tensor, const std::string& name) {
    const bool ok = place_ == Place::kCpu ? tensor.is_cpu() : tensor.is_cuda();
    require(ok, name, " is on the ",
            ok ? ""
               : (tensor.is_cuda()  ? "GPU"
                  : tensor.is_cpu() ? "CPU"
                                    : "wrong device"),
            ", the other arguments on the ", place_ == Place::kCpu ? "CPU" : "GPU");
    const int index = tensor.get_device_index();
    if (index_ < 0 && place_ == Place::kCuda) index_ = index;
    require(place_ == Place::kCpu || index == index_, name, " is on cuda:", index,
            ", the other arguments on cuda:", index_);
  }

  int device_index() const { return index_; }

  // A contiguous vector of int32 or int64 with at least `least` elements.
  Ints ints(const Tensor& tensor, const std::string& name, int64_t least) {
    device(tensor, name);
    require(tensor.dim() == 1, name, " has ", tensor.dim(), " dimensions, needs 1");
    const auto type = tensor.scalar_type();
    require(type == ScalarType::Int || type == ScalarType::Long, name, " has dtype ", dtype_name(type),
            ", needs int32 or int64");
    require(tensor.size(0) >= least, name, " has ", tensor.size(0), " elements, needs ", least);
    require(tensor.size(0) < 2 || tensor.stride(0) == 1, name, " has stride ", tensor.stride(0), ", needs 1");
    return Ints{tensor.data_ptr(), tensor.size(0), type == ScalarType::Long};
  }

  Ints ints(const OptionalTensor& tensor, const std::string& name, int64_t least) {
    return tensor.has_value() ? ints(*tensor, name, least) : Ints{};
  }

  float* floats(const OptionalTensor& tensor, const std::string& name, int64_t least) {
    if (!tensor.has_value()) return nullptr;
    device(*tensor, name);
    require(tensor->dim() == 1, name, " has ", tensor->dim(), " dimensions, needs 1");
    require(tensor->scalar_type() == ScalarType::Float, name, " has dtype ", dtype_name(tensor->scalar_type()),
            ", needs float32");
    require(tensor->size(0) >= least, name, " has ", tensor->size(0), " elements, needs ", least);
    require(tensor->size(0) < 2 || tensor->stride(0) == 1, name, " has stride ", tensor->stride(0), ", needs 1");
    return static_cast<float*>(tensor->data_ptr());
  }

  // Row `row` of an int64 matrix [rows, >= least].
  int64_t* row(const Tensor& tensor, const std::string& name, int64_t row, int64_t least) {
    require(row >= 0 && row < tensor.size(0), name, " has ", tensor.size(0), " rows, row ", row, " is asked for");
    require(tensor.size(1) >= least, name, " has rows of ", tensor.size(1), ", needs ", least);
    return static_cast<int64_t*>(tensor.data_ptr()) + row * tensor.stride(0);
  }

  void int64_matrix(const Tensor& tensor, const std::string& name) {
    device(tensor, name);
    require(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions, needs 2");
    require(tensor.scalar_type() == ScalarType::Long, name, " has dtype ", dtype_name(tensor.scalar_type()),
            ", needs int64");
    require(tensor.size(1) < 2 || tensor.stride(1) == 1, name, " has inner stride ", tensor.stride(1), ", needs 1");
  }

  void inner_contiguous(const Tensor& tensor, const std::string& name) const {
    const int64_t last = tensor.dim() - 1;
    require(tensor.size(last) < 2 || tensor.stride(last) == 1, name, " has inner stride ", tensor.stride(last),
            ", needs 1");
  }

  Float real(const Tensor& tensor, const std::string& name, bool float8 = false) {
    device(tensor, name);
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return Float::kFloat32;
      case ScalarType::Half:
        return Float::kFloat16;
      case ScalarType::BFloat16:
        return Float::kBFloat16;
      case ScalarType::Float8_e4m3fn:
        if (float8) return Float::kFloat8E4M3;
        break;
      case ScalarType::Float8_e5m2:
        if (float8) return Float::kFloat8E5M2;
        break;
      default:
        break;
    }
    require(false, name, " has dtype ", dtype_name(tensor.scalar_type()), ", needs float32, float16 or bfloat16",
            float8 ? " or a float8" : "");
    return Float::kFloat32;
  }

  static std::string dtype_name(ScalarType type) {
    std::ostringstream out;
    out << torch::headeronly::toString(type);
    return out.str();
  }

 private:
  const char* op_;
  Place place_;
  int index_ = -1;
};

inline const char* float_name(Float dtype) {
  switch (dtype) {
    case Float::kFloat32:
      return "float32";
    case Float::kFloat16:
      return "float16";
    case Float::kBFloat16:
      return "bfloat16";
    case Float::kFloat8E4M3:
      return "float8_e4m3fn";
    case Float::kFloat8E5M2:
      return "float8_e5m2";
  }
  return "unknown";
}

// clang-format off
inline BuildBlockParams check_build_block(
    Place place, const Tensor& anchor_ids, const Tensor& target_positions, const Tensor& query_start_loc,
    const OptionalTensor& num_rejected, const OptionalTensor& seq_lens, const OptionalTensor& request_index,
    const OptionalTensor& num_sampled, const OptionalTensor& prefill_ids, const OptionalTensor& temperature,
    const OptionalTensor& seeds, const std::vector<Tensor>& block_tables, const std::vector<int64_t>& kv_block_sizes,
    int64_t num_draft_tokens, int64_t mask_token_id, int64_t max_model_len, bool sample_from_anchor,
    const Tensor& input_ids, const Tensor& query_positions, const Tensor& query_slots,
    const std::vector<int64_t>& query_slot_rows, const Tensor& context_positions, const Tensor& context_slots,
    const Tensor& sample_indices, const Tensor& block_start_loc, const Tensor& block_seq_lens,
    const OptionalTensor& sample_positions, const OptionalTensor& sample_requests,
    const OptionalTensor& temperature_out, const OptionalTensor& seeds_out) {
  // clang-format on
  Checker check("build_block", place);
  BuildBlockParams p;
  check.require(num_draft_tokens >= 1, "num_draft_tokens is ", num_draft_tokens, ", needs at least 1");
  check.require(max_model_len >= 1, "max_model_len is ", max_model_len, ", needs at least 1");
  p.query_start_loc = check.ints(query_start_loc, "query_start_loc", 1);
  const int64_t B = p.num_requests = query_start_loc.size(0) - 1;
  p.target_positions = check.ints(target_positions, "target_positions", 0);
  const int64_t T = p.num_context = target_positions.size(0);
  const int64_t K = p.num_draft_tokens = num_draft_tokens;
  const int64_t Q = p.num_query_per_request = sample_from_anchor ? K : K + 1;
  p.mask_token_id = mask_token_id;
  p.max_model_len = max_model_len;
  p.sample_from_anchor = sample_from_anchor;

  p.anchor_ids = check.ints(anchor_ids, "anchor_ids", request_index.has_value() ? 0 : B);
  p.num_rejected = check.ints(num_rejected, "num_rejected", B);
  p.seq_lens = check.ints(seq_lens, "seq_lens", B);
  p.request_index = check.ints(request_index, "request_index", B);
  check.require(num_sampled.has_value() == prefill_ids.has_value(),
                "num_sampled and prefill_ids must be given together");
  p.num_sampled = check.ints(num_sampled, "num_sampled", B);
  // Without request_index request i has state row i.
  const int64_t least_states = request_index.has_value() ? 0 : B;
  p.prefill_ids = check.ints(prefill_ids, "prefill_ids", least_states);

  p.num_groups = static_cast<int64_t>(block_tables.size());
  check.require(p.num_groups >= 1 && p.num_groups <= kMaxGroups, "block_tables has ", p.num_groups,
                " KV-cache groups, supported are 1 to ", kMaxGroups);
  check.require(kv_block_sizes.size() == block_tables.size(), "kv_block_sizes has ", kv_block_sizes.size(),
                " entries, block_tables ", block_tables.size());
  check.require(query_slot_rows.size() == block_tables.size(), "query_slot_rows has ", query_slot_rows.size(),
                " entries, block_tables ", block_tables.size());
  check.int64_matrix(query_slots, "query_slots");
  check.int64_matrix(context_slots, "context_slots");
  p.query_slots_size = query_slots.size(1);
  p.context_slots_size = context_slots.size(1);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const Tensor& table = block_tables[g];
    const std::string name = "block_tables[" + std::to_string(g) + "]";
    check.device(table, name);
    check.require(table.dim() == 2, name, " has ", table.dim(), " dimensions, needs 2");
    check.require(table.scalar_type() == ScalarType::Int, name, " has dtype ", Checker::dtype_name(table.scalar_type()),
                  ", needs int32");
    check.require(table.size(0) >= B, name, " has ", table.size(0), " rows, needs ", B);
    check.inner_contiguous(table, name);
    check.require(kv_block_sizes[g] >= 1, "kv_block_sizes[", g, "] is ", kv_block_sizes[g], ", needs at least 1");
    p.block_tables[g] =
        BlockTable{static_cast<const int32_t*>(table.data_ptr()), table.stride(0), table.size(1), kv_block_sizes[g]};
    p.query_slots[g] = check.row(query_slots, "query_slots", query_slot_rows[g], B * Q);
    p.context_slots[g] = check.row(context_slots, "context_slots", g, T);
  }

  p.input_ids = check.ints(input_ids, "input_ids", B * Q);
  p.query_positions = check.ints(query_positions, "query_positions", B * Q);
  p.context_positions = check.ints(context_positions, "context_positions", T);
  p.sample_indices = check.ints(sample_indices, "sample_indices", B * K);
  p.block_start_loc = check.ints(block_start_loc, "block_start_loc", B + 1);
  p.block_seq_lens = check.ints(block_seq_lens, "block_seq_lens", B);
  p.sample_positions = check.ints(sample_positions, "sample_positions", B * K);
  p.sample_requests = check.ints(sample_requests, "sample_requests", B * K);
  check.require(temperature.has_value() == temperature_out.has_value(),
                "temperature and temperature_out must be given together");
  check.require(seeds.has_value() == seeds_out.has_value(), "seeds and seeds_out must be given together");
  p.temperature = check.floats(temperature, "temperature", least_states);
  p.temperature_out = check.floats(temperature_out, "temperature_out", temperature ? temperature->size(0) : 0);
  p.seeds = check.ints(seeds, "seeds", least_states);
  p.seeds_out = check.ints(seeds_out, "seeds_out", p.seeds.size);
  p.num_states = p.anchor_ids.size;
  if (prefill_ids.has_value()) p.num_states = std::min(p.num_states, p.prefill_ids.size);
  if (temperature.has_value()) p.num_states = std::min(p.num_states, temperature->size(0));
  if (seeds.has_value()) p.num_states = std::min(p.num_states, p.seeds.size);
  return p;
}

inline TapParams check_tap_hidden_states(Place place, const Tensor& features, const Tensor& hidden,
                                         const OptionalTensor& residual, int64_t column) {
  Checker check("tap_hidden_states", place);
  TapParams p;
  p.dtype = check.real(features, "features");
  for (const auto& [tensor, name] : {std::pair{&features, "features"}, std::pair{&hidden, "hidden"}}) {
    check.require(tensor->dim() == 2, name, " has ", tensor->dim(), " dimensions, needs 2");
    check.inner_contiguous(*tensor, name);
  }
  const Float dtype = check.real(hidden, "hidden");
  check.require(dtype == p.dtype, "hidden has dtype ", float_name(dtype), ", features ", float_name(p.dtype));
  p.num_tokens = hidden.size(0);
  p.hidden_size = hidden.size(1);
  check.require(features.size(0) >= p.num_tokens, "features has ", features.size(0), " rows, hidden ", p.num_tokens);
  check.require(column >= 0 && column + p.hidden_size <= features.size(1), "column is ", column, ", hidden has ",
                p.hidden_size, " columns, features ", features.size(1));
  p.hidden = hidden.data_ptr();
  p.hidden_stride = hidden.stride(0);
  if (residual.has_value()) {
    const Float other = check.real(*residual, "residual");
    check.require(other == p.dtype, "residual has dtype ", float_name(other), ", features ", float_name(p.dtype));
    check.require(residual->dim() == 2 && residual->size(0) == p.num_tokens && residual->size(1) == p.hidden_size,
                  "residual must have the shape of hidden, [", p.num_tokens, ", ", p.hidden_size, "]");
    check.inner_contiguous(*residual, "residual");
    p.residual = residual->data_ptr();
    p.residual_stride = residual->stride(0);
  }
  const int64_t bytes = p.dtype == Float::kFloat32 ? 4 : 2;
  p.features = static_cast<char*>(features.data_ptr()) + column * bytes;
  p.features_stride = features.stride(0);
  return p;
}

// clang-format off
inline StoreContextKvParams check_store_context_kv(
    Place place, const Tensor& kv, const Tensor& k_norm_weights, double eps, const Tensor& positions,
    const Tensor& cos_sin_cache, bool is_neox, double value_scale, const std::vector<Tensor>& slots,
    const std::vector<Tensor>& key_caches,
    const std::vector<Tensor>& value_caches, const OptionalTensor& key_scales, const OptionalTensor& value_scales) {
  // clang-format on
  Checker check("store_context_kv", place);
  StoreContextKvParams p;
  p.dtype = check.real(kv, "kv");
  check.require(kv.dim() == 5 && kv.size(2) == 2, "kv must have the shape [tokens, layers, 2, heads, head_size]");
  p.num_tokens = kv.size(0);
  p.num_layers = kv.size(1);
  p.num_heads = kv.size(3);
  p.head_size = kv.size(4);
  check.require(p.num_layers >= 1 && p.num_layers <= kMaxLayers, "kv has ", p.num_layers,
                " layers, supported are 1 to ", kMaxLayers);
  check.inner_contiguous(kv, "kv");
  check.require(p.num_heads < 2 || kv.stride(3) == p.head_size, "kv has head stride ", kv.stride(3), ", needs ",
                p.head_size);
  p.kv = kv.data_ptr();
  p.kv_token_stride = kv.stride(0);
  p.kv_layer_stride = kv.stride(1);
  p.kv_value_offset = kv.stride(2);

  const Float norm = check.real(k_norm_weights, "k_norm_weights");
  check.require(norm == p.dtype, "k_norm_weights has dtype ", float_name(norm), ", kv ", float_name(p.dtype));
  check.require(k_norm_weights.dim() == 2 && k_norm_weights.size(0) == p.num_layers &&
                    k_norm_weights.size(1) == p.head_size && k_norm_weights.is_contiguous(),
                "k_norm_weights must be contiguous with shape [", p.num_layers, ", ", p.head_size, "]");
  p.k_norm_weights = k_norm_weights.data_ptr();
  p.eps = static_cast<float>(eps);
  p.positions = check.ints(positions, "positions", p.num_tokens);

  p.rope_dtype = check.real(cos_sin_cache, "cos_sin_cache");
  check.require(p.rope_dtype == p.dtype || p.rope_dtype == Float::kFloat32, "cos_sin_cache has dtype ",
                float_name(p.rope_dtype), ", needs float32 or that of kv, ", float_name(p.dtype));
  check.require(cos_sin_cache.dim() == 2 && cos_sin_cache.is_contiguous(),
                "cos_sin_cache must be contiguous with shape [positions, rotary_dim]");
  p.num_positions = cos_sin_cache.size(0);
  check.require(p.num_positions >= 1 || p.num_tokens == 0, "cos_sin_cache has no rows");
  p.rotary_dim = cos_sin_cache.size(1);
  check.require(p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_size, "cos_sin_cache rotates ", p.rotary_dim,
                " elements, needs an even number of at most ", p.head_size);
  p.cos_sin_cache = cos_sin_cache.data_ptr();
  p.is_neox = is_neox;
  p.value_scale = static_cast<float>(value_scale);

  const auto L = static_cast<size_t>(p.num_layers);
  check.require(key_caches.size() == L, "key_caches has ", key_caches.size(), " layers, kv ", L);
  check.require(value_caches.size() == L, "value_caches has ", value_caches.size(), " layers, kv ", L);
  check.require(slots.empty() || slots.size() == L, "slots has ", slots.size(), " layers, kv ", L);
  for (size_t layer = 0; layer < L; ++layer) {
    for (const bool is_key : {true, false}) {
      const Tensor& cache = is_key ? key_caches[layer] : value_caches[layer];
      const std::string name = std::string(is_key ? "key_caches[" : "value_caches[") + std::to_string(layer) + "]";
      const Float dtype = check.real(cache, name, true);
      check.require(cache.dim() == 4 && cache.size(2) == p.num_heads && cache.size(3) == p.head_size, name,
                    " must have the shape [blocks, kv_block_size, ", p.num_heads, ", ", p.head_size, "]");
      check.inner_contiguous(cache, name);
      if (layer == 0 && is_key) {
        p.cache_dtype = dtype;
        p.num_blocks = cache.size(0);
        p.kv_block_size = cache.size(1);
        check.require(p.kv_block_size >= 1, name, " has blocks of ", p.kv_block_size, " tokens");
        const bool float8 = dtype == Float::kFloat8E4M3 || dtype == Float::kFloat8E5M2;
        check.require(float8 || dtype == p.dtype, name, " has dtype ", float_name(dtype), ", kv ", float_name(p.dtype));
      }
      check.require(dtype == p.cache_dtype && cache.size(0) == p.num_blocks && cache.size(1) == p.kv_block_size, name,
                    " differs from key_caches[0] in dtype, number of blocks or block size");
      PagedCache& target = is_key ? p.keys[layer] : p.values[layer];
      target = PagedCache{cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
    }
    if (slots.empty()) continue;
    const std::string name = "slots[" + std::to_string(layer) + "]";
    const Ints given = check.ints(slots[layer], name, p.num_tokens);
    check.require(given.wide, name, " has dtype int32, needs int64");
    p.slots[layer] = static_cast<const int64_t*>(given.data);
  }
  check.require(!slots.empty() || p.num_tokens <= p.num_blocks * p.kv_block_size, "kv has ", p.num_tokens,
                " tokens, the caches hold ", p.num_blocks * p.kv_block_size);
  p.key_scales = check.floats(key_scales, "key_scales", p.num_layers);
  p.value_scales = check.floats(value_scales, "value_scales", p.num_layers);
  return p;
}

}  // namespace vllm_dflash
