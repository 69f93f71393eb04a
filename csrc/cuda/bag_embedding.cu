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
                                     int64_t bag_size, int64_t dim, int64_t rows, A scale) {
  const int64_t bag = blockIdx.x;
  for (int64_t column = threadIdx.x; column < dim; column += blockDim.x) {
    A sum = 0;
    for (int64_t i = 0; i < bag_size; ++i) {
      const int64_t id = ids[bag * bag_size + i];
      // As torch's own gathers do: stop the kernel rather than read outside the table, without a host round trip.
      if (id < 0 || id >= rows) __trap();
      sum += widen(weight[id * dim + column]);
    }
    narrow(sum * scale, out[bag * dim + column]);
  }
}

}  // namespace tst::cuda

// ---- op --------------------------------------------------------------------------------------------------------

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
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
void launch(const Tensor& ids, const Tensor& table, Tensor& out, double scale, cudaStream_t stream) {
  const int64_t bag_size = ids.size(ids.dim() - 1), dim = table.size(1), bags = ids.numel() / bag_size;
  const int threads = static_cast<int>(std::min<int64_t>(256, (dim + 31) / 32 * 32));
  const auto go = [&](const auto* id_data) {
    bag_embedding_kernel<T, A><<<static_cast<unsigned>(bags), threads, 0, stream>>>(
        id_data, static_cast<const T*>(table.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()), bag_size, dim,
        table.size(0), static_cast<A>(scale));
  };
  if (ids.scalar_type() == ScalarType::Long)
    go(ids.const_data_ptr<int64_t>());
  else
    go(ids.const_data_ptr<int32_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor bag_embedding(const Tensor& input_ids, const Tensor& weight, const std::string& mode) {
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
  const double scale = mode == "mean" ? 1.0 / static_cast<double>(shape.back()) : 1.0;
  shape.back() = table.size(1);
  Tensor out = torch::stable::new_empty(weight, shape);
  if (out.numel() == 0) return out;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      launch<float, float>(ids, table, out, scale, s);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16, float>(ids, table, out, scale, s);
      break;
    case ScalarType::Half:
      launch<__half, float>(ids, table, out, scale, s);
      break;
    case ScalarType::Double:
      launch<double, double>(ids, table, out, scale, s);
      break;
    default:
      STD_TORCH_CHECK(false, "weight: expected float32, bfloat16, float16 or float64");
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) { m.impl("bag_embedding", TORCH_BOX(&bag_embedding)); }

}  // namespace tst::cuda
