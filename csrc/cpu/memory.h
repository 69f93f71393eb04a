// Memory of large results.
#pragma once

#include "../tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tst::cpu {

// Asks for huge pages under memory that nothing has been written to. Faulting in 525 MB takes 150 ms in pages of 4 KiB
// and 32 ms in pages of 2 MiB: more than the embedding's gradient takes otherwise. Only for blocks that malloc maps and
// unmaps one by one, above 32 MiB; elsewhere the advice would outlive the tensor.
inline void advise_huge_pages(uintptr_t start, size_t bytes) {
#if defined(__linux__)
  if (bytes <= size_t(32) << 20) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: the kernel may decline
#else
  (void)start, (void)bytes;
#endif
}

inline Tensor with_huge_pages(Tensor tensor) {
  advise_huge_pages(reinterpret_cast<uintptr_t>(tensor.data_ptr()),
                    static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

}  // namespace tst::cpu
