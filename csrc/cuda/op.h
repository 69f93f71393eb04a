// Shared by the CUDA ops: the current stream, launches, and torch's dtypes in the terms of the raw kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../tensor.h"
#include "device.h"

namespace tst::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

struct Extent {  // of a launch
  dim3 grid;
  unsigned threads;      // of a block
  unsigned cluster = 1;  // blocks, along the grid's x
  size_t shared_bytes = 0;
};

// Makes the tensor's device current, and launches on its current stream.
struct Current {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Current(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  template <typename... Parameters, typename... Args>
  void launch(void (*kernel)(Parameters...), const Extent& extent, Args&&... args) const {
    const Launch launch(kernel, extent, stream);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&launch.config, kernel, std::forward<Args>(args)...));
  }

  // The clusters of such a launch that the device runs at a time.
  template <typename... Parameters>
  int64_t resident(void (*kernel)(Parameters...), const Extent& extent) const {
    const Launch launch(kernel, extent, stream);
    const void* const function = reinterpret_cast<const void*>(kernel);
    int count = 0;
    if (extent.cluster > 1) {
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, function, &launch.config));
    } else {
      STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, static_cast<int>(extent.threads),
                                                                   extent.shared_bytes));
      count *= device_attribute(cudaDevAttrMultiProcessorCount);
    }
    return std::max(count, 1);
  }

 private:
  struct Launch {
    cudaLaunchAttribute cluster{};
    cudaLaunchConfig_t config{};

    template <typename Kernel>
    Launch(Kernel kernel, const Extent& extent, cudaStream_t stream) {
      constexpr size_t kUnasked = 48 << 10;  // bytes of shared memory that every kernel may have
      // Asks for all there is, so that no thread takes back what another asked for.
      if (extent.shared_bytes > kUnasked) {
        const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      }
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = extent.cluster;
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      const unsigned attributes = extent.cluster > 1 ? 1 : 0;  // devices without clusters refuse the attribute
      config = {extent.grid, dim3(extent.threads), extent.shared_bytes, stream, &cluster, attributes};
    }
    Launch(const Launch&) = delete;
  };
};

inline void check_same_device(const char* names, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index(), names,
                  ": expected tensors on one CUDA device");
}

inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of the dtype's storage type.
template <typename F>
void with_type(const char* name, const Tensor& tensor, F f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "too large for one CUDA grid: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

}  // namespace tst::cuda
