// A device on the host: the calls of cuda_runtime.h, and torch's C functions that answer only in a CUDA build. torch
// has some of them on the CPU too: the library is linked with -Bsymbolic, so that its own calls come here, and no
// other's.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace {

constexpr int kUnasked = 48 << 10, kMultiprocessors = 2;

int capability = 90, compiled_for = 90, shared_memory = 227 << 10, guards = 0;
std::map<const void*, int> asked;  // shared memory that a kernel may have
std::vector<int64_t> launches;     // grid x and y, threads, cluster, shared bytes, of each
struct DeviceGuardOpaque* const kGuard = reinterpret_cast<DeviceGuardOpaque*>(&guards);

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;  // few, so that a test sees more work than one pass of a device-wide grid does
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_memory;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = compiled_for;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > shared_memory) return cudaErrorInvalidValue;
  asked[kernel] = value;
  return cudaSuccess;
}

// One block a multiprocessor, where it may have what it asks for.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t bytes) {
  const int allowed = asked.count(kernel) ? asked[kernel] : kUnasked;
  *blocks = threads <= 1024 && bytes <= static_cast<size_t>(allowed);
  return *blocks ? cudaSuccess : cudaErrorInvalidValue;
}

// Two clusters, however large.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  *clusters = kMultiprocessors;
  int blocks = 0;
  if (config->numAttrs != 1 || config->stream != emulated_stream()) return cudaErrorInvalidValue;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(config->block.x),
                                                       config->dynamicSmemBytes);
}

cudaStream_t emulated_stream() { return reinterpret_cast<cudaStream_t>(&launches); }

cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const dim3 grid = config.grid, block = config.block;
  const int allowed = asked.count(kernel) ? asked[kernel] : kUnasked;
  if (guards == 0 || config.stream != emulated_stream()) return cudaErrorInvalidValue;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1 || block.x == 0 ||
      block.x > 1024 || block.x % 32 || block.y != 1 || block.z != 1)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > static_cast<size_t>(allowed)) return cudaErrorInvalidValue;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (std::min(capability, compiled_for) < 90 || size.x == 0 || size.x > 8 || grid.x % size.x || size.y != 1 ||
        size.z != 1)
      return cudaErrorInvalidConfiguration;
    cluster = size.x;
  }
  launches.insert(launches.end(), {grid.x, grid.y, block.x, cluster, static_cast<int64_t>(config.dynamicSmemBytes)});
  emulator::launch({grid.x, grid.y, 1}, block.x, cluster, config.dynamicSmemBytes, thread);
  return cudaSuccess;
}

extern "C" {

// For the Python tests, through ctypes.
[[gnu::visibility("default")]] void emulated_device(int architecture, int code, int shared_bytes) {
  capability = architecture, compiled_for = code, shared_memory = shared_bytes;
  asked.clear();
}
// The launches since the last call, five numbers each: copies at most `capacity` numbers, returns how many there were.
[[gnu::visibility("default")]] int64_t emulated_launches(int64_t* values, int64_t capacity) {
  const int64_t count = static_cast<int64_t>(launches.size());
  for (int64_t i = 0; i < std::min(count, capacity); ++i) values[i] = launches[i];
  launches.clear();
  return count;
}

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = kGuard;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = emulated_stream();
  return 0;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  if (error != cudaSuccess) *message = strdup(("CUDA error " + std::to_string(error)).c_str());
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
}
