// bag_embedding's forward on CUDA.

// ---- raw kernel: no torch header -------------------------------------------------------------------------------

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tst::cuda {

// Spelled out: torch compiles extensions without the implicit conversions of the 16-bit types.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

// One block per bag, threads along the embedding dimension, so that each of the bag_size row reads is coalesced.
// Accumulates in A in the order of the bag and rounds once. bag * dim and id * dim pass 2^31: 64-bit offsets.
template <typename T, typename A, typename Index>
__global__ void bag_embedding_kernel(const Index* __restrict__ ids,  // [bags, bag_size]
                                     const T* __restrict__ weight,   // [rows, dim]
                                     T* __restrict__ out,            // [bags, dim]
                                     int64_t bag_size, int64_t dim, int64_t rows, bool mean, bool padded,
                                     int64_t padding_idx,
                                     const double* __restrict__ position_weights) {  // [bag_size] or nullptr: all 1
  const int64_t bag = blockIdx.x;
  for (int64_t column = threadIdx.x; column < dim; column += blockDim.x) {
    A sum = 0, total = 0;
    for (int64_t i = 0; i < bag_size; ++i) {
      const int64_t id = ids[bag * bag_size + i];
      if (padded && id == padding_idx) continue;
      // As torch's own gathers do: stop the kernel rather than read outside the table, without a host round trip.
      if (id < 0 || id >= rows) __trap();
      const A w = position_weights ? static_cast<A>(position_weights[i]) : A(1);
      sum += w * widen(weight[id * dim + column]);
      total += w;
    }
    narrow(mean ? (total == 0 ? A(0) : sum / total) : sum, out[bag * dim + column]);
  }
}

}  // namespace tst::cuda

// ---- op --------------------------------------------------------------------------------------------------------

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"

namespace tst::cuda {

std::string architectures() {
  const int list[] = {__CUDA_ARCH_LIST__};
  std::string names;
  for (const int arch : list) names += (names.empty() ? "sm_" : ", sm_") + std::to_string(arch / 10);
  return names;
}

template <typename T, typename A>
void launch(const Tensor& ids, const Tensor& table, Tensor& out, bool mean, std::optional<int64_t> padding_idx,
            const double* position_weights, cudaStream_t stream) {
  const int64_t bag_size = ids.size(ids.dim() - 1), dim = table.size(1), bags = ids.numel() / bag_size;
  const int threads = static_cast<int>(std::min<int64_t>(256, (dim + 31) / 32 * 32));
  const auto go = [&](const auto* id_data) {
    bag_embedding_kernel<T, A><<<static_cast<unsigned>(bags), threads, 0, stream>>>(
        id_data, static_cast<const T*>(table.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), bag_size, dim,
        table.size(0), mean, padding_idx.has_value(), padding_idx.value_or(0), position_weights);
  };
  if (ids.scalar_type() == ScalarType::Long)
    go(ids.const_data_ptr<int64_t>());
  else
    go(ids.const_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor bag_embedding(const Tensor& input_ids, const Tensor& weight, const std::string& mode,
                     std::optional<int64_t> padding_idx, const std::optional<Tensor>& position_weights) {
  STD_TORCH_CHECK(mode == "mean" || mode == "sum", "mode: expected 'mean' or 'sum', got '", mode, "'");
  STD_TORCH_CHECK(weight.dim() == 2 && input_ids.is_cuda() && weight.is_cuda() &&
                      input_ids.get_device_index() == weight.get_device_index(),
                  "input_ids, weight: expected [..., bag_size] and [V, d] on one CUDA device");
  STD_TORCH_CHECK(input_ids.dim() >= 1 && input_ids.size(input_ids.dim() - 1) >= 1,
                  "input_ids: expected [..., bag_size] with bag_size >= 1");
  STD_TORCH_CHECK(input_ids.scalar_type() == ScalarType::Long || input_ids.scalar_type() == ScalarType::Int,
                  "input_ids: expected int64 or int32");
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(weight.get_device_index(), &stream));
  const Tensor ids = torch::stable::contiguous(input_ids), table = torch::stable::contiguous(weight);

  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  const bool mean = mode == "mean";
  STD_TORCH_CHECK(!position_weights || position_weights->numel() == shape.back(),
                  "position_weights: expected one weight per position of the bag");
  std::optional<Tensor> wide;
  if (position_weights) wide = torch::stable::contiguous(torch::stable::to(*position_weights, ScalarType::Double));
  const double* weights = wide ? wide->const_data_ptr<double>() : nullptr;
  shape.back() = table.size(1);
  Tensor out = torch::stable::new_empty(weight, shape);
  if (out.numel() == 0) return out;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      launch<float, float>(ids, table, out, mean, padding_idx, weights, s);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16, float>(ids, table, out, mean, padding_idx, weights, s);
      break;
    case ScalarType::Half:
      launch<__half, float>(ids, table, out, mean, padding_idx, weights, s);
      break;
    case ScalarType::Double:
      launch<double, double>(ids, table, out, mean, padding_idx, weights, s);
      break;
    default:
      STD_TORCH_CHECK(false, "weight: expected float32, bfloat16, float16 or float64");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) { m.impl("bag_embedding", TORCH_BOX(&bag_embedding)); }

}  // namespace tst::cuda
