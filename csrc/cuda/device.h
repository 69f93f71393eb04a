// What the raw CUDA kernels use of the device: storage formats, reductions, clusters. No torch header.
//
// The kernels are compiled twice: by nvcc, and by the host's compiler for the C++ tests, where tests/cpp/emulator.h
// runs blocks and clusters of threads as fibres and stands in for what this header takes from CUDA.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tst::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace tst::cuda

#ifdef __CUDACC__
#undef NDEBUG  // the checks of ids and labels are device assertions, as torch's are
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#define TST_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace tst::cuda {

// Written out: torch compiles extensions without the implicit conversions of CUDA's own 16-bit types.
__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow(float x, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void narrow(float x, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

// exp as exact as its result is stored: the 16-bit formats take the hardware's 2^x, without expf's corrections.
template <typename T>
__device__ inline Acc<T> exponential(Acc<T> x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp(x);
}

template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Clusters are there from sm_90 on; before, every block is a cluster of its own.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
// Arrival and waiting apart: nobody needs to wait for those who are still reading before the block's end.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
template <typename T>
__device__ inline const T* cluster_shared(const T* mine, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}
#else
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }
template <typename T>
__device__ inline const T* cluster_shared(const T* mine, unsigned) {
  return mine;
}
#endif

}  // namespace tst::cuda
#else
#include "emulator.h"
#endif

namespace tst::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }

// What a thread moves at a time: 16 bytes, or an element where rows are not aligned.
template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  T values[n];
};
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename T, int n>
__device__ inline Pack<T, n> narrowed(const Acc<T> (&values)[n]) {
  Pack<T, n> pack;
#ifdef __CUDACC__
  constexpr bool kPairs = std::is_same_v<T, BFloat16> && n % 2 == 0;  // one instruction for two
#else
  constexpr bool kPairs = false;
#endif
  if constexpr (kPairs) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(values[i], values[i + 1]);
      pack.values[i].bits = __bfloat16_as_ushort(two.x);
      pack.values[i + 1].bits = __bfloat16_as_ushort(two.y);
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) narrow(values[i], pack.values[i]);
  }
  return pack;
}

constexpr int kWarp = 32;

// The same for all threads of the block, combined in a fixed order: within warps in a tree, then warp by warp. scratch
// [32] in shared memory must not be in use, and stays in use until the block's next barrier.
template <typename V, typename Combine>
__device__ inline V block_reduce(V value, V* scratch, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  V result = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) result = combine(result, scratch[warp]);
  return result;
}

}  // namespace tst::cuda
