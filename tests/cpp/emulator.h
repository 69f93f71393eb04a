// CUDA's execution model on the host, for the raw kernels of csrc/cuda: blocks and clusters of threads as fibres of one
// thread, which change over at barriers and shuffles alone, in random order.
//
// It is strict. A barrier that some thread of a block never reaches is an error, and so are copies to shared memory
// that a thread has not waited for at its end. Shared memory is exactly as large as was asked for and full of NaN
// before a block begins and after it has ended. Under ThreadSanitizer two threads that touch the same memory without a
// barrier between them are a race.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Relaxed atomics throughout: the bookkeeping must not order what the threads do, or no race would show.
struct Barrier {
  std::atomic<unsigned> expected{0}, arrived{0}, generation{0};

  unsigned arrive([[maybe_unused]] bool orders_memory = true) {
    const unsigned now = generation.load(std::memory_order_relaxed);
#if defined(__SANITIZE_THREAD__)
    if (orders_memory) __tsan_release(this);
#endif
    if (arrived.fetch_add(1, std::memory_order_relaxed) + 1 == expected.load(std::memory_order_relaxed)) {
      arrived.store(0, std::memory_order_relaxed);
      generation.store(now + 1, std::memory_order_relaxed);
    }
    return now;
  }
  bool passed(unsigned since) const { return generation.load(std::memory_order_relaxed) != since; }
};

struct alignas(16) Chunk {
  unsigned char bytes[16];
};

struct Block {
  std::unique_ptr<Chunk[]> shared;
  size_t shared_chunks = 0;
  Barrier barrier;
  std::vector<Barrier> warps;
  using Slots = std::vector<std::atomic<uint64_t>>;
  Slots slots[2];  // of shuffles, one a thread; two turns, since nobody is two shuffles ahead
  unsigned rank = 0;
  std::atomic<unsigned> running{0};
  void poison() { std::memset(shared.get(), 0xff, shared_chunks * sizeof(Chunk)); }
  explicit Block(unsigned threads) : warps(threads / 32), slots{Slots(threads), Slots(threads)} {
    barrier.expected = threads;
    for (Barrier& warp : warps) warp.expected = 32;
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  Cluster* cluster = nullptr;
  const std::function<void()>* kernel = nullptr;
  Dim thread, block_index;
  std::atomic<const Barrier*> waiting{nullptr};
  std::atomic<unsigned> since{0};
  std::atomic<bool> done{false};
  std::exception_ptr error;
  bool turn = false;                                  // of shuffles
  std::vector<std::pair<void*, const void*>> copies;  // to shared memory, under way
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
  bool begun = false;
#endif
};

constexpr size_t kStack = 128 << 10;

struct Machine {  // one at a time
  ucontext_t scheduler;
  std::atomic<Fiber*> current{nullptr};
  std::atomic<bool> failed{false};
  Dim block_dim, grid_dim;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};
inline Machine machine;
inline Fiber& fiber() { return *machine.current.load(std::memory_order_relaxed); }

inline void to_scheduler([[maybe_unused]] bool last = false) {
  Fiber& self = fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &self.fake_stack, machine.stack_bottom, machine.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&self);                    // to the end of the launch alone, where all fibres are acquired
  __tsan_switch_to_fiber(machine.tsan, 1);  // 1: a change of fibres orders nothing
#endif
  swapcontext(&self.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

inline void wait(const Barrier& barrier, unsigned since, [[maybe_unused]] bool orders_memory = true) {
  Fiber& self = fiber();
  self.since.store(since, std::memory_order_relaxed);
  self.waiting.store(&barrier, std::memory_order_relaxed);
  to_scheduler();
  self.waiting.store(nullptr, std::memory_order_relaxed);
#if defined(__SANITIZE_THREAD__)
  if (orders_memory) __tsan_acquire(const_cast<Barrier*>(&barrier));
#endif
}

inline void entry() {
  Fiber& self = fiber();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  try {
    (*self.kernel)();
    if (!self.copies.empty()) throw std::logic_error("a copy to shared memory that nobody waits for");
  } catch (...) {
    self.error = std::current_exception();
    machine.failed.store(true, std::memory_order_relaxed);
  }
  self.done.store(true, std::memory_order_relaxed);
  to_scheduler(true);
}

inline void resume(Fiber& next) {
  machine.current.store(&next, std::memory_order_relaxed);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.fake_stack, next.stack.get(), kStack);
#endif
#if defined(__SANITIZE_THREAD__)
  const unsigned orders_nothing = next.begun;  // at its first turn it sees what was written before the launch
  next.begun = true;
  __tsan_switch_to_fiber(next.tsan, orders_nothing);
#endif
  swapcontext(&machine.scheduler, &next.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
}

// What outlives a launch, because making it anew would be most of the time.
struct Spare {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
#if defined(__SANITIZE_THREAD__)
  void* tsan = __tsan_create_fiber(0);
#endif
};

// One cluster, whose first block is at `first`; what a thread throws comes out of here.
inline void run_cluster(Dim first, unsigned threads, unsigned cluster_size, size_t shared_bytes,
                        const std::function<void()>& kernel) {
  static std::mt19937 order(1);
  static std::vector<Spare> spares;
  while (spares.size() < threads * cluster_size) spares.emplace_back();
  Cluster cluster;
  cluster.barrier.expected = threads * cluster_size;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (unsigned b = 0; b < cluster_size; ++b) {
    cluster.blocks.push_back(std::make_unique<Block>(threads));
    Block& block = *cluster.blocks.back();
    block.rank = b, block.running = threads, block.shared_chunks = (shared_bytes + 15) / 16;
    block.shared = std::make_unique<Chunk[]>(block.shared_chunks);
    block.poison();
    for (unsigned t = 0; t < threads; ++t) {
      auto f = std::make_unique<Fiber>();
      f->block = &block, f->cluster = &cluster, f->kernel = &kernel;
      f->thread = {t, 0, 0}, f->block_index = {first.x + b, first.y, 0};
      Spare& spare = spares[fibers.size()];
      f->stack = std::move(spare.stack);
#if defined(__SANITIZE_THREAD__)
      f->tsan = spare.tsan;
#endif
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.get(), f->context.uc_stack.ss_size = kStack;
      makecontext(&f->context, entry, 0);
      fibers.push_back(std::move(f));
    }
  }
  std::vector<Fiber*> ready;
  for (auto& f : fibers) ready.push_back(f.get());
  size_t live = fibers.size();
  // One block runs ahead of the others for some turns, then all for one, then another block: what they should have
  // waited for shows.
  const unsigned nobody = cluster_size;
  unsigned ahead = nobody;
  bool dead = false;
  machine.failed = false;
  while (live > 0 && !dead && !machine.failed) {
    std::shuffle(ready.begin(), ready.end(), order);
    bool moved = false;
    for (Fiber* f : ready) {
      const Barrier* barrier = f->waiting.load(std::memory_order_relaxed);
      if (f->done.load(std::memory_order_relaxed) || (ahead != nobody && f->block->rank != ahead)) continue;
      if (barrier && !barrier->passed(f->since.load(std::memory_order_relaxed))) continue;
      moved = true;
      resume(*f);
      if (!f->done.load(std::memory_order_relaxed)) continue;
      --live;
#if !defined(__SANITIZE_THREAD__)  // to which this would be a race with those who read it rightly before
      if (--f->block->running == 0) f->block->poison();
#endif
    }
    dead = !moved && ahead == nobody;
    if (ahead == nobody) {
      ahead = static_cast<unsigned>(order() % (cluster_size + 1));
    } else if (!moved || order() % 8 == 0) {
      ahead = nobody;
    }
  }
  std::exception_ptr error;
  for (size_t i = 0; i < fibers.size(); ++i) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(fibers[i].get());
    if (!fibers[i]->done) spares[i].tsan = __tsan_create_fiber(0);  // the old one stays where it was
#endif
    if (fibers[i]->error) error = fibers[i]->error;
    spares[i].stack = std::move(fibers[i]->stack);
  }
  if (error) std::rethrow_exception(error);
  if (dead) throw std::logic_error("a barrier that not all threads reach");
}

// Runs kernel() in every thread of the grid, a cluster at a time.
inline void launch(Dim grid, unsigned threads, unsigned cluster_size, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  if (threads % 32 || grid.x % cluster_size) throw std::logic_error("a launch that CUDA refuses");
  machine.block_dim = {threads, 1, 1}, machine.grid_dim = grid;
#if defined(__SANITIZE_THREAD__)
  if (!machine.tsan) machine.tsan = __tsan_get_current_fiber();
#endif
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster_size) {
      run_cluster({x, y, 0}, threads, cluster_size, shared_bytes, kernel);
    }
  }
}

}  // namespace emulator

// What the kernels take from CUDA.
#define __global__
#define __device__
#define __launch_bounds__(...)
#define TST_SHARED_MEMORY(name) unsigned char* name = ::emulator::fiber().block->shared.get()->bytes
#define threadIdx (::emulator::fiber().thread)
#define blockIdx (::emulator::fiber().block_index)
#define blockDim (::emulator::machine.block_dim)
#define gridDim (::emulator::machine.grid_dim)
#define __syncthreads() \
  ::emulator::wait(::emulator::fiber().block->barrier, ::emulator::fiber().block->barrier.arrive())
#undef assert
#define assert(condition) ((condition) ? void() : throw std::out_of_range(#condition))

namespace tst::cuda {

using std::max;
using std::min;

inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(Float16 x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  const float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                     : std::ldexp(float(fraction), -24);
  return x.bits & 0x8000 ? -value : value;
}
inline void narrow(float x, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to.bits = static_cast<uint16_t>(std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Float16& to) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x) || magnitude >= 65520) {
    to.bits = sign | (std::isnan(x) ? 0x7e00 : 0x7c00);
    return;
  }
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  if (magnitude < 0x1p-14f) exponent = -13;                                 // 2^-24 is the last place of the smallest
  const float ulps = std::nearbyint(std::ldexp(magnitude, 11 - exponent));  // of 11 bits: half to even
  to.bits = sign | static_cast<uint16_t>(ulps + std::ldexp(float(exponent + 13), 10));
}

template <typename T>
uint32_t narrowed_pair(float x, float y, T) {
  T low, high;
  narrow(x, low), narrow(y, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
template <typename T>
uint32_t larger_pair(uint32_t x, uint32_t y, T) {
  const auto larger = [](uint16_t a, uint16_t b) {
    return std::isnan(widen(T{a})) || widen(T{a}) < widen(T{b}) ? b : a;
  };
  return larger(static_cast<uint16_t>(x), static_cast<uint16_t>(y)) |
         static_cast<uint32_t>(larger(static_cast<uint16_t>(x >> 16), static_cast<uint16_t>(y >> 16))) << 16;
}
inline float as_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline uint32_t as_word(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
inline double as_double(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline void as_words(double x, uint32_t& low, uint32_t& high) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
}

struct __attribute__((may_alias, aligned(16))) Words4 {
  uint32_t x, y, z, w;
};
inline void store_global(Words4* to, Words4 four) { *to = four; }
inline void store_streaming(Words4* to, Words4 four) { *to = four; }
inline int count_up(int* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// A copy is NaN until it is waited for, and is made then.
inline void copy_to_shared(Words4* to, const Words4* from) {
  std::memset(static_cast<void*>(to), 0xff, sizeof(Words4));
  emulator::fiber().copies.emplace_back(to, from);
}
inline void copies_wait() {
  for (const auto& [to, from] : emulator::fiber().copies) std::memcpy(to, from, sizeof(Words4));
  emulator::fiber().copies.clear();
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float larger(float x, float y) { return std::fmax(x, y); }
inline double larger(double x, double y) { return std::fmax(x, y); }

// Every lane gives its value and takes the value of another lane. As on a device, this orders no access to memory.
template <typename T>
T exchanged(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  emulator::Fiber& self = emulator::fiber();
  emulator::Block& block = *self.block;
  const unsigned t = self.thread.x;
  emulator::Barrier& warp = block.warps[t / 32];
  emulator::Block::Slots& slots = block.slots[self.turn = !self.turn];
  uint64_t bytes = 0;
  std::memcpy(&bytes, &value, sizeof(T));
  slots[t].store(bytes, std::memory_order_relaxed);
  emulator::wait(warp, warp.arrive(false), false);
  bytes = slots[t / 32 * 32 + lane].load(std::memory_order_relaxed);
  std::memcpy(&value, &bytes, sizeof(T));
  return value;
}
template <typename T>
T shuffle(T value, int lane) {
  return exchanged(value, static_cast<unsigned>(lane));
}
template <typename T>
T shuffle_xor(T value, int mask) {
  return exchanged(value, emulator::fiber().thread.x % 32 ^ static_cast<unsigned>(mask));
}
inline void warp_barrier() {
  emulator::Barrier& warp = emulator::fiber().block->warps[emulator::fiber().thread.x / 32];
  emulator::wait(warp, warp.arrive());
}

inline unsigned cluster_size() { return static_cast<unsigned>(emulator::fiber().cluster->blocks.size()); }
inline unsigned cluster_rank() { return emulator::fiber().block->rank; }
inline void cluster_barrier() {
  emulator::Barrier& all = emulator::fiber().cluster->barrier;
  emulator::wait(all, all.arrive());
}

// A turn ends when the owner has said what it expects and that many bytes have come, in any order.
struct Mailbox {
  emulator::Barrier turns;  // its generation is the turn
  std::atomic<int> missing{0};

  void change(int bytes) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&turns);
#endif
    if (missing.fetch_add(bytes, std::memory_order_relaxed) + bytes == 0) {
      turns.generation.fetch_add(1, std::memory_order_relaxed);
    }
  }
};
inline void mailbox_open(Mailbox* box) {  // atomic, as the scheduler reads the turn
  box->turns.generation.store(0, std::memory_order_relaxed);
  box->missing.store(0, std::memory_order_relaxed);
}
inline void mailbox_expect(Mailbox* box, int bytes) { box->change(bytes); }
inline void mailbox_wait(Mailbox* box, int turn) { emulator::wait(box->turns, static_cast<unsigned>(turn)); }
template <int n>
void mail(const uint32_t (&words)[n], void* slot, Mailbox* box, unsigned rank) {
  const emulator::Fiber& self = emulator::fiber();
  unsigned char *mine = self.block->shared.get()->bytes, *to = self.cluster->blocks[rank]->shared.get()->bytes;
  const auto there = [&](void* here) { return to + (static_cast<unsigned char*>(here) - mine); };
  std::memcpy(there(slot), words, sizeof(words));
  reinterpret_cast<Mailbox*>(there(box))->change(-static_cast<int>(sizeof(words)));
}

}  // namespace tst::cuda
