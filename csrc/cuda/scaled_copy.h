// out = factor * source, rounded once: a gradient of a 16-bit parameter, of a float32 sum or in place. Raw pointers, no
// torch header. torch.mul into a tensor of another dtype moves 1.3 TB/s on an H200 that copies 4.3.
#pragma once

#include "device.h"

namespace tst::cuda {

constexpr int kScaledThreads = 256;  // of a block
constexpr int kScaledBlocks = 8;     // that must fit a multiprocessor of 2048 threads: 32 registers each

// n numbers a thread and pass; the last thread has the remaining ones. In place a factor of 1, as a plain
// loss.backward() has it, leaves them unread. So the grid is no larger than the device: a block for every 2048 numbers,
// 304000 for the gradient of a head of 151936 x 4096, would start only to return.
template <typename S, typename O, int n>
__global__ void __launch_bounds__(kScaledThreads, kScaledBlocks)
    scaled_copy_kernel(const S* source, const float* factor, O* out, int64_t count) {
  const float scale = *factor;
  if (std::is_same_v<S, O> && static_cast<const void*>(source) == out && scale == 1) return;
  const int64_t pass = int64_t(gridDim.x) * blockDim.x * n;
  for (int64_t begin = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) * n; begin < count; begin += pass) {
    if (begin + n <= count) {
      const Pack<S, n> pack = load<S, n>(source + begin);
      float values[n];
#pragma unroll
      for (int i = 0; i < n; ++i) values[i] = scale * pack[i];
      store<false>(out + begin, narrowed<O>(values));
    } else {
      for (int64_t i = begin; i < count; ++i) narrow(scale * widen(source[i]), out[i]);
    }
  }
}

}  // namespace tst::cuda
