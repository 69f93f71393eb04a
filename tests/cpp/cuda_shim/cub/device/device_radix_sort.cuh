// cub's SortPairs as a stable sort by the bits that it was asked to look at.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

namespace cub {

struct DeviceRadixSort {
  template <typename Key, typename Value>
  static cudaError_t SortPairs(void* scratch, size_t& scratch_bytes, const Key* keys, Key* sorted_keys,
                               const Value* values, Value* sorted_values, int count, int begin_bit, int end_bit,
                               cudaStream_t stream) {
    const size_t needed = static_cast<size_t>(count) * (sizeof(Key) + sizeof(Value)) + 1;
    if (!scratch) {
      scratch_bytes = needed;
      return cudaSuccess;
    }
    if (scratch_bytes < needed || count < 0 || begin_bit < 0 || end_bit > int(8 * sizeof(Key)) ||
        stream != emulated_stream())
      return cudaErrorInvalidValue;
    std::memset(scratch, 0xff, scratch_bytes);  // a buffer that is too small shows under AddressSanitizer
    const auto bits = [&](int i) {
      const uint64_t below = end_bit == 64 ? ~uint64_t(0) : (uint64_t(1) << end_bit) - 1;
      return (static_cast<uint64_t>(keys[i]) & below) >> begin_bit;
    };
    std::vector<int> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return bits(a) < bits(b); });
    for (int i = 0; i < count; ++i) sorted_keys[i] = keys[order[i]], sorted_values[i] = values[order[i]];
    return cudaSuccess;
  }
};

}  // namespace cub
