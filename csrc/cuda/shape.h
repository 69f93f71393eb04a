// How a row of the loss is cut into blocks: a function of sizes and of what the device has. No torch, no CUDA runtime,
// so that the C++ tests can sweep it.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "loss_rows.h"

namespace tst::cuda {

struct DeviceFacts {
  bool clusters;          // sm_90 and later, running code that was compiled for it
  int64_t shared_memory;  // bytes that a block can ask for: 99 KiB on sm_89 and sm_120, 163 on sm_80, 227 on sm_90
};

struct Shape {
  int blocks;  // of a row, and of the cluster
  int threads;
  Pass pass;
  int cache_bytes;   // of a block's slice of the row
  int shared_bytes;  // in all
};

// Measured on an H200. Four blocks per multiprocessor and 16 packs per thread: each row costs a block the same
// reductions and barriers, however many threads wait for them. An even number of warps for the columns: 5 take 8 %
// longer than 4. Without a gradient, which needs no shared memory, 64 packs per thread.
template <typename T>
Shape shape_of(int64_t vocabulary, int64_t bag_size, bool gradient, const DeviceFacts& device) {
  const int64_t most = device.shared_memory, empty = loss_rows_memory<T>(0);
  const int64_t longest_bag = (most - empty) / (loss_rows_memory<T>(1) - empty);
  if (bag_size > longest_bag) {
    throw std::runtime_error("labels: expected bags of at most " + std::to_string(longest_bag) +
                             " labels on this device, got " + std::to_string(bag_size));
  }
  constexpr int64_t kReserved = 1 << 10;  // bytes that each block takes in addition to what it asks for
  const int64_t fixed = loss_rows_memory<T>(bag_size);
  const int64_t comfortable = gradient ? (most + kReserved) / 4 - kReserved - fixed : 160 << 10;
  int64_t blocks = 1;
  while (device.clusters && blocks < kMaxBlocks && slice_bytes<T>(vocabulary, blocks) > comfortable) blocks *= 2;
  const int64_t slice = slice_bytes<T>(vocabulary, blocks);
  // Without clusters a long row would leave room for one block: it is read a second time, mostly out of the cache.
  const bool cached = gradient && fixed + slice <= (device.clusters ? most : std::min<int64_t>(most, 80 << 10));
  const int64_t packs = slice / 16, cache = cached ? slice : 0, each = gradient ? 16 : 64;
  // As many blocks as shared memory has room for must fit by their registers too: 64 a thread, of 32 warps' worth.
  const int64_t together = cached ? std::max<int64_t>(1, (most + kReserved) / (fixed + cache + kReserved)) : 1;
  const int64_t limit = std::clamp<int64_t>((32 / together - 1) / 2 * 2, 2, (kMaxThreads / kWarp - 1) / 2 * 2);
  const int64_t pairs = (packs + each * kWarp) / (2 * each * kWarp);  // of warps, the nearest number
  const int64_t warps = std::clamp<int64_t>(2 * pairs, 2, limit);
  const int64_t threads = (warps + 1) * kWarp;  // one warp has the labels
  const Pass pass = !gradient ? Pass::kLoss : cached ? Pass::kCachedGradient : Pass::kGradient;
  return {static_cast<int>(blocks), static_cast<int>(threads), pass, static_cast<int>(cache),
          static_cast<int>(fixed + cache)};
}

}  // namespace tst::cuda
