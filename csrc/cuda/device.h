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

// Two numbers in a word, the first one in its lower half.
__device__ inline uint32_t narrowed_pair(float x, float y, BFloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ inline uint32_t narrowed_pair(float x, float y, Float16) {
  const __half2 two = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&two);
}
// The larger ones of two pairs. Ignores a NaN, as fmax does.
__device__ inline uint32_t larger_pair(uint32_t x, uint32_t y, BFloat16) {
  const __nv_bfloat162 two =
      __hmax2(*reinterpret_cast<const __nv_bfloat162*>(&x), *reinterpret_cast<const __nv_bfloat162*>(&y));
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ inline uint32_t larger_pair(uint32_t x, uint32_t y, Float16) {
  const __half2 two = __hmax2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ inline float as_float(uint32_t word) { return __uint_as_float(word); }
__device__ inline uint32_t as_word(float x) { return __float_as_uint(x); }
__device__ inline double as_double(uint32_t low, uint32_t high) { return __hiloint2double(high, low); }
__device__ inline void as_words(double x, uint32_t& low, uint32_t& high) {
  low = __double2loint(x), high = __double2hiint(x);
}

using Words4 = uint4;
// 16 bytes of global memory in one store: nvcc 13 splits an assignment on sm_80 to sm_90.
__device__ inline void store_global(Words4* to, Words4 four) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(four.x), "r"(four.y), "r"(four.z), "r"(four.w)
               : "memory");
}
// The same for what nobody reads soon: the second-level cache gives up its place first.
__device__ inline void store_streaming(Words4* to, Words4 four) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(four.x), "r"(four.y), "r"(four.z),
               "r"(four.w)
               : "memory");
}

__device__ inline int count_up(int* counter) { return atomicAdd(counter, 1); }  // what it was before

__device__ inline float exp2_fast(float x) {  // 2 units in the last place; 0 below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Ignores a NaN, as fmax does.
__device__ inline float larger(float x, float y) { return fmaxf(x, y); }
__device__ inline double larger(double x, double y) { return fmax(x, y); }

template <typename T>
__device__ inline T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline void warp_barrier() { __syncwarp(); }

__device__ inline uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}
// 16 bytes from global to shared memory, where this thread finds them after copies_wait(). Meanwhile they take no
// register.
__device__ inline void copy_to_shared(Words4* to, const Words4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Clusters are there from sm_90 on; before, every block is a cluster of its own.
//
// A mailbox is where the blocks of a cluster leave numbers for one of them, in its shared memory: one thread opens it,
// before a barrier of the cluster. Each turn one thread of the owner says how many bytes will come, any thread mails
// some, and the owner's threads wait. Only those who wait are held up; a barrier would hold up all threads of all
// blocks, and what they have stored would have to be visible first.
struct Mailbox {
  uint64_t barrier;
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
__device__ inline void mailbox_open(Mailbox* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void mailbox_expect(Mailbox* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
               : "memory");
}
// Words, 4 at a time, to the slot of block `rank`. Slot and box are given as their own addresses in this block.
template <int n>
__device__ inline void mail(const uint32_t (&words)[n], void* slot, Mailbox* box, unsigned rank) {
  static_assert(n % 4 == 0);
  uint32_t to, at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(slot)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(box)), "r"(rank));
#pragma unroll
  for (int i = 0; i < n; i += 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to + 4 * i),
        "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(at)
        : "memory");
  }
}
__device__ inline void mailbox_wait(Mailbox* box, int turn) {  // turns count from 0
  asm volatile(
      "{\n.reg .pred came;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 came, [%0], %1;\n@!came bra again;\n}" ::"r"(
          shared_address(box)),
      "r"(turn & 1)
      : "memory");
}
#else
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline void cluster_barrier() { __syncthreads(); }
__device__ inline void mailbox_open(Mailbox*) {}
__device__ inline void mailbox_expect(Mailbox*, int) {}
template <int n>
__device__ inline void mail(const uint32_t (&)[n], void*, Mailbox*, unsigned) {}
__device__ inline void mailbox_wait(Mailbox*, int) {}
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

// n elements as they lie in memory: what a thread moves at a time, 16 bytes, or one element where rows are not aligned.
// In words: nvcc 13 splits a copy of 16-bit elements into 7 stores on sm_80 to sm_90.
template <typename T, int n>
struct Pack {
  static constexpr int kBytes = n * static_cast<int>(sizeof(T));
  uint32_t words[(kBytes + 3) / 4];

  __device__ Acc<T> operator[](int i) const {  // i is known when compiled, in unrolled loops
    if constexpr (sizeof(T) == 8)
      return as_double(words[2 * i], words[2 * i + 1]);
    else if constexpr (sizeof(T) == 4)
      return as_float(words[i]);
    else if constexpr (std::is_same_v<T, BFloat16>)
      return as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    else
      return widen(T{static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])});
  }
  __device__ static Pack lowest() {  // -inf, of 16 bytes
    constexpr uint32_t kHigh = sizeof(T) == 8                ? 0xfff00000u
                               : sizeof(T) == 4              ? 0xff800000u
                               : std::is_same_v<T, BFloat16> ? 0xff80ff80u
                                                             : 0xfc00fc00u;
    constexpr uint32_t kLow = sizeof(T) == 8 ? 0 : kHigh;
    return {{kLow, kHigh, kLow, kHigh}};
  }
  __device__ static Pack of(Words4 four) {
    Pack pack;
    pack.set_four(0, four);
    return pack;
  }
  __device__ Words4 four(int i = 0) const {
    return Words4{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
  }
  __device__ void set_four(int i, Words4 four) {
    words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
  }
};
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <typename T, int n>
__device__ inline Pack<T, n> narrowed(const Acc<T> (&values)[n]) {
  Pack<T, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 8)
      as_words(values[i], pack.words[2 * i], pack.words[2 * i + 1]);
    else if constexpr (sizeof(T) == 4)
      pack.words[i] = as_word(values[i]);
    else if (i % 2 == 0)
      pack.words[i / 2] = narrowed_pair(values[i], n == 1 ? 0 : values[n == 1 ? 0 : i + 1], T{});
  }
  return pack;
}

template <typename T, int n>
__device__ inline Pack<T, n> load(const T* from) {
  using P = Pack<T, n>;
  P pack;
  if constexpr (P::kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i) pack.set_four(i, reinterpret_cast<const Words4*>(from)[i]);
  } else if constexpr (P::kBytes == 8) {
    as_words(*from, pack.words[0], pack.words[1]);
  } else if constexpr (P::kBytes == 4) {
    pack.words[0] = as_word(*from);
  } else {
    pack.words[0] = from->bits;
  }
  return pack;
}

// To global memory.
template <bool last_use, typename T, int n>
__device__ inline void store(T* to, const Pack<T, n>& pack) {
  using P = Pack<T, n>;
  if constexpr (P::kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < P::kBytes / 16; ++i) {
      Words4* const at = reinterpret_cast<Words4*>(to) + i;
      last_use ? store_streaming(at, pack.four(i)) : store_global(at, pack.four(i));
    }
  } else if constexpr (P::kBytes == 8) {
    *to = as_double(pack.words[0], pack.words[1]);
  } else if constexpr (P::kBytes == 4) {
    *to = as_float(pack.words[0]);
  } else {
    to->bits = static_cast<uint16_t>(pack.words[0]);
  }
}

constexpr int kWarp = 32;
__device__ inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

// The same in all lanes of a warp, in a fixed tree.
template <typename A>
__device__ inline A warp_sum(A value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <typename A>
__device__ inline A warp_max(A value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace tst::cuda
