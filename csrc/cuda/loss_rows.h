// The row kernel of the loss on CUDA: log-sum-exp, loss, and the logits overwritten by their gradient. Raw pointers, no
// torch header. The formulas are those of ../loss.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "../loss.h"
#include "device.h"

namespace tst::cuda {

constexpr int kMaxThreads = 512;
constexpr int kMaxBlocks = 8;  // of a cluster: more are not portable
// The most packs a thread takes at a time: loads from global memory in flight. With a gradient 4, so that 64 registers
// are enough. tanh and float64 take longer than the loads, and long to compile.
template <typename T, bool plain>
constexpr int kBatch = plain && sizeof(T) < 8 ? 8 : 1;

template <typename T>
struct LossRows {
  T* logits;  // [rows, vocabulary]
  int64_t rows;
  int64_t stride;  // of rows, in elements
  int vocabulary;
  const int64_t* labels;  // [rows, bag_size], each in [0, vocabulary) or ignore_index
  int bag_size;
  const Acc<T>* label_scale;  // [bag_size], or [rows, bag_size] with scale_stride bag_size in place of 0
  int64_t scale_stride;
  LossOptions options;
  const Acc<T>* grad_loss;   // [rows], or one for all with grad_loss_stride 0; nullptr: 1
  int64_t grad_loss_stride;  // 0 or 1
  const Acc<T>* grad_lse;    // [rows]; nullptr: 0
  Acc<T>* loss;              // [rows]
  Acc<T>* lse;               // [rows]
  int cache_bytes;           // of a block's slice of the row in shared memory, with Pass::kCachedGradient; else 0
};

// The purpose of a launch. A gradient needs the logits twice: its block keeps them in shared memory, or reads them
// again.
enum class Pass { kLoss, kGradient, kCachedGradient };

// exp(x) for x up to 0. 16-bit logits take the hardware's 2^x, whose error of 2 units in the last place of
// float32 is far below the rounding of the result; float32 takes expf. The maximum is subtracted before x is
// multiplied: a product of a large logit would be rounded by more than its distance from the maximum.
constexpr float kLog2E = 1.44269504088896340736f;
template <typename T>
__device__ inline Acc<T> power(Acc<T> x) {
  if constexpr (sizeof(T) == 2)
    return exp2_fast(x * kLog2E);
  else
    return exp(x);
}

template <typename A>
struct Target {  // a label of the row
  int label;     // -1: counts for nothing
  bool leads;    // first of its kind in the bag: it stands for all of them
  A weight;
  A logit;  // z
  A pull;   // a_v of loss.h, of a leader
};

template <typename A>
struct RowResult {
  A maximum;
  RowTerms<A> terms;
  A log2_factor;  // of its size, and the sign bits of a pair of 16-bit numbers where the factor is below 0
  uint32_t negative;
};

// Shared, before the cached slice and the targets. Rows take turns where a warp may be a row ahead of another.
template <typename A>
struct alignas(16) RowMemory {
  RowSums<A> warps[2][kMaxThreads / kWarp];
  RowSums<A> blocks[2][kMaxBlocks];  // by mail
  Mailbox boxes[2];
  RowResult<A> result;
};

// Packs of a row start at 16-byte addresses, the first one at or before the row's first column. A slice is some of
// them.
template <typename T>
struct RowPacks {
  T* x;
  int vocabulary, head, count;
  __device__ RowPacks(T* row, int columns)
      : x(row),
        vocabulary(columns),
        head(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))),
        count((head + columns - 1) / kPack<T> + 1) {}
  __device__ int begin(int p) const { return p * kPack<T> - head; }
  __device__ int pack_of(int column) const { return (column + head) / kPack<T>; }
  __device__ bool whole(int p) const { return begin(p) >= 0 && begin(p) + kPack<T> <= vocabulary; }
  __device__ bool inside(int p, int i) const { return begin(p) + i >= 0 && begin(p) + i < vocabulary; }
  __device__ Words4* whole_packs() const { return reinterpret_cast<Words4*>(x - head); }
  __device__ Pack<T, kPack<T>> load_edge(int p) const {
    Acc<T> values[kPack<T>] = {};
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (inside(p, i)) values[i] = widen(x[begin(p) + i]);
    }
    return narrowed<T>(values);
  }
  __device__ void store_edge(int p, const Pack<T, kPack<T>>& pack) const {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (inside(p, i)) narrow(pack[i], x[begin(p) + i]);
    }
  }
};

// Packs [first, last) of a row, and [begin, end) of them that lie in it as a whole: all but its first and its last.
struct Slice {
  int first, last, begin, end;

  template <typename T>
  __device__ Slice(const RowPacks<T>& row, int blocks, int rank) {
    const int length = (row.count + blocks - 1) / blocks;
    first = min(rank * length, row.count);
    last = min(first + length, row.count);
    begin = first + (first == 0 && !row.whole(0));
    end = last - (last == row.count && !row.whole(row.count - 1));
  }
  // The first whole pack of a thread; the next ones are `step` apart.
  __device__ int mine() const { return begin + static_cast<int>(threadIdx.x); }
  // Calls f with the other packs, which the first thread has.
  template <typename F>
  __device__ void edges(F f) const {
    if (threadIdx.x != 0) return;
    for (int p = first; p < begin; ++p) f(p);
    for (int p = max(begin, end); p < last; ++p) f(p);
  }
};

template <typename A>
__device__ inline A capped(A x, A cap) {
  return cap == 0 ? x : cap * tanh(x / cap);
}

// x - m, where both may be -inf: there is nothing yet, and its sums are 0.
template <typename A>
__device__ inline A above(A x, A m) {
  return x == m ? A(0) : x - m;
}

struct AllThere {
  __device__ bool operator()(int, int) const { return true; }
};

// Adds to a thread's sums the columns i of its packs b for which there(b, i). The maximum changes once for all of them,
// and seldom after the first. The maximum ignores a NaN, which shows in the sum.
template <typename T, bool plain, int n, typename There = AllThere>
__device__ inline void add_packs(RowSums<Acc<T>>& sums, const Pack<T, kPack<T>> (&packs)[n], Acc<T> cap,
                                 There there = {}) {
  using A = Acc<T>;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  A best = kLowest, capped_values[plain ? 1 : n][kPack<T>] = {};
  const auto z = [&](int b, int i) {
    if constexpr (plain)
      return packs[b][i];
    else
      return capped_values[b][i];
  };
  if constexpr (plain && sizeof(T) == 2 && std::is_same_v<There, AllThere>) {
    uint32_t pair = packs[0].words[0];  // two columns an instruction, and not widened
#pragma unroll
    for (int b = 0; b < n; ++b) {
#pragma unroll
      for (const uint32_t word : packs[b].words) pair = larger_pair(pair, word, T{});
    }
    const Pack<T, 2> two{{pair}};
    best = larger(best, larger(two[0], two[1]));
  } else {
#pragma unroll
    for (int b = 0; b < n; ++b) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if constexpr (!plain) capped_values[b][i] = capped(packs[b][i], cap);
        if (there(b, i)) best = larger(best, z(b, i));
      }
    }
  }
  if (best > sums.maximum) {
    sums.exps *= power<T>(sums.maximum - best);
    if (!plain && sums.columns > 0) sums.logits += sums.columns * (sums.maximum - best);
    sums.maximum = best;
  }
  const A m = sums.maximum == kLowest ? A(0) : sums.maximum;  // exp(-inf - m) is 0 for any m but -inf
#pragma unroll
  for (int b = 0; b < n; ++b) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (!there(b, i)) continue;
      sums.exps += power<T>(z(b, i) - m);
      if (!plain && z(b, i) > kLowest) {
        sums.logits += z(b, i) - m;
        sums.columns += 1;
      }
    }
  }
}

// The sums of a warp's lanes, in all of them.
template <typename T, bool plain>
__device__ inline RowSums<Acc<T>> sums_of_warp(const RowSums<Acc<T>>& mine) {
  using A = Acc<T>;
  RowSums<A> out{warp_max(mine.maximum), 0, 0, 0};
  const A shift = above(mine.maximum, out.maximum);  // -inf where a lane saw nothing: its sums are 0, or NaN
  out.exps = warp_sum(mine.exps * power<T>(shift));
  if constexpr (!plain) {
    out.logits = warp_sum(mine.columns > 0 ? mine.logits + mine.columns * shift : A(0));
    out.columns = warp_sum(mine.columns);
  }
  return out;
}

// One warp: the sums of the first `count` of those at `parts`, at most one a lane.
template <typename T, bool plain>
__device__ inline RowSums<Acc<T>> sums_of(const RowSums<Acc<T>>* parts, int count) {
  RowSums<Acc<T>> mine{-static_cast<Acc<T>>(INFINITY), 0, 0, 0};
  if (lane() < count) mine = parts[lane()];
  return sums_of_warp<T, plain>(mine);
}

// One warp: reads the labels and their logits, which the gradient overwrites later, and finds the leaders.
template <typename T>
__device__ inline void read_targets(const LossRows<T>& a, int64_t r, const T* x, Target<Acc<T>>* targets) {
  using A = Acc<T>;
  for (int i = lane(); i < a.bag_size; i += kWarp) {
    Target<A> target{-1, false, 0, 0, 0};
    const int64_t y = a.labels[r * a.bag_size + i];
    if (y != a.options.ignore_index) {
      assert(y >= 0 && y < a.vocabulary && "labels: out of range");
      target.weight = a.label_scale[r * a.scale_stride + i];
      if (target.weight != 0) {
        target.label = static_cast<int>(y);
        target.logit = capped(widen(x[y]), static_cast<A>(a.options.logit_softcap));
      }
    }
    targets[i] = target;
  }
  warp_barrier();
  for (int i = lane(); i < a.bag_size; i += kWarp) {
    const int label = targets[i].label;
    bool leads = label >= 0;
    A pull = 0;
    for (int j = 0; j < a.bag_size; ++j) {
      if (targets[j].label != label) continue;
      pull += targets[j].weight;
      if (j < i) leads = false;
    }
    targets[i].leads = leads;
    targets[i].pull = leads ? pull : 0;
  }
}

// One warp, one lane per label, from the row's sums; in the cluster's first block it writes loss and lse.
template <typename T>
__device__ inline RowResult<Acc<T>> finish_row(const LossRows<T>& a, int64_t r, const RowSums<Acc<T>>& sums,
                                               Target<Acc<T>>* targets, bool write) {
  using A = Acc<T>;
  const bool set = a.options.objective == Objective::kMceAlt;
  const A log_sum = log(sums.exps);
  // Above 0 but for rounding: the labels are part of the vocabulary, and a mean is no maximum.
  const auto positive = [](A x) { return x < 0 ? A(0) : x; };
  // lse - z, from the maximum rather than from lse: lse near 1e4 would cost three digits in float32.
  const auto below = [&](A z) { return (sums.maximum - z) + log_sum; };
  A scale = 0, fit = 0, best = -static_cast<A>(INFINITY);
  for (int i = lane(); i < a.bag_size; i += kWarp) {
    const Target<A>& t = targets[i];
    if (t.label < 0) continue;
    scale += set ? A(1) : t.weight;
    if (t.leads && !set) fit += t.pull * positive(below(t.logit));
    best = larger(best, t.logit);
  }
  scale = warp_sum(scale);
  if (set) {
    if (scale != 0) scale = a.label_scale[r * a.scale_stride];
    best = warp_max(best);
    A total = 0;
    for (int i = lane(); i < a.bag_size; i += kWarp) {
      Target<A>& t = targets[i];
      if (t.leads) total += t.pull = t.logit == best ? A(1) : exp(t.logit - best);
    }
    total = warp_sum(total);
    for (int i = lane(); i < a.bag_size; i += kWarp) targets[i].pull *= scale / total;
    fit = scale * positive(below(best) - log(total));
  } else {
    fit = warp_sum(fit);
  }
  const A g = a.grad_loss ? a.grad_loss[r * a.grad_loss_stride] : A(1), u = a.grad_lse ? a.grad_lse[r] : A(0);
  const RowTerms<A> terms = row_terms<A>(a.options, sums, log_sum, scale, fit, g, u);
  if (write && lane() == 0) {
    a.loss[r] = terms.loss;
    a.lse[r] = terms.lse;
  }
  return {sums.maximum, terms, log2(fabs(terms.factor)), terms.factor < 0 ? 0x80008000u : 0};
}

// x_v <- factor * exp(z_v - m), without `plain` minus `uniform` where z_v > -inf, times the derivative of the cap.
template <typename T, bool plain>
__device__ inline Pack<T, kPack<T>> gradient_pack(const Pack<T, kPack<T>>& pack, const RowResult<Acc<T>>& row,
                                                  Acc<T> cap) {
  using A = Acc<T>;
  constexpr bool kScaled = plain && sizeof(T) == 2;
  A out[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if constexpr (kScaled) {
      out[i] = exp2_fast(fma(pack[i] - row.maximum, kLog2E, row.log2_factor));
    } else if constexpr (plain) {
      out[i] = row.terms.factor * power<T>(pack[i] - row.maximum);
    } else {
      const A z = capped(pack[i], cap), t = cap == 0 ? A(0) : z / cap;
      out[i] =
          (row.terms.factor * power<T>(z - row.maximum) - (z > -static_cast<A>(INFINITY) ? row.terms.uniform : A(0))) *
          (A(1) - t * t);
    }
  }
  Pack<T, kPack<T>> result = narrowed<T>(out);
  if constexpr (kScaled) {
#pragma unroll
    for (uint32_t& word : result.words) word ^= row.negative;
  }
  return result;
}

// A block of the row kernel. A cluster of blocks has rows first, first + clusters, ..., each block a slice of their
// columns; where there are no clusters one block has whole rows. A block's last warp has the labels and the row's end,
// the others the columns. `plain`: no softcap, no smoothing.
template <typename T, bool plain, Pass pass>
struct RowBlock {
  using A = Acc<T>;
  using P = Pack<T, kPack<T>>;
  static constexpr bool gradient = pass != Pass::kLoss, cached = pass == Pass::kCachedGradient;

  const LossRows<T>& a;
  RowMemory<A>& memory;
  Words4* const cache;
  Target<A>* const targets;      // [2, bag_size]
  const int blocks, rank, step;  // step: from one pack of a thread to its next
  const int64_t first, clusters;
  const A cap;

  __device__ RowBlock(const LossRows<T>& arguments, unsigned char* shared)
      : a(arguments),
        memory(*reinterpret_cast<RowMemory<A>*>(shared)),
        cache(reinterpret_cast<Words4*>(shared + sizeof(RowMemory<A>))),
        targets(reinterpret_cast<Target<A>*>(shared + sizeof(RowMemory<A>) + a.cache_bytes)),
        blocks(static_cast<int>(cluster_size())),
        rank(static_cast<int>(cluster_rank())),
        step(static_cast<int>(blockDim.x) - kWarp),
        first(blockIdx.x / static_cast<unsigned>(blocks)),
        clusters(gridDim.x / static_cast<unsigned>(blocks)),
        cap(static_cast<A>(a.options.logit_softcap)) {}

  __device__ RowPacks<T> row(int64_t r) const { return {a.logits + r * a.stride, a.vocabulary}; }

  // This thread's packs of a row, on their way to where it keeps them.
  struct Copies {
    const Words4* from;
    Words4* to;
    int p, end, step;
    __device__ void next() {
      if (p < end) copy_to_shared(to, from);
      p += step, from += step, to += step;
    }
    __device__ void rest() {
      while (p < end) next();
    }
  };
  __device__ Copies copies_of(int64_t r) const {
    const RowPacks<T> x = row(r);
    const Slice mine(x, blocks, rank);
    return {x.whole_packs() + mine.mine(), cache + threadIdx.x, mine.mine(), r < a.rows ? mine.end : 0, step};
  }

  // The warps of the columns: the sums of a row's slice. Where it waits in shared memory, logits cross the memory bus
  // once in each direction.
  __device__ void sum_up(int64_t r, int turn) const {
    constexpr int kPacks = gradient ? std::min(4, kBatch<T, plain>) : kBatch<T, plain>;
    static_assert(plain || kPacks == 1, "capped, -inf would add exp(-cap)");
    const RowPacks<T> x = row(r);
    const Slice mine(x, blocks, rank);
    RowSums<A> sums{-static_cast<A>(INFINITY), 0, 0, 0};
    int p = mine.mine();
    const Words4* from = cached ? cache + threadIdx.x : x.whole_packs() + p;
    const auto take = [&](auto all) {  // kPacks of them, or those that are left
      P batch[kPacks];
#pragma unroll
      for (int b = 0; b < kPacks; ++b) {
        batch[b] = all() || p + b * step < mine.end ? P::of(from[b * step]) : P::lowest();  // which adds 0
      }
      add_packs<T, plain>(sums, batch, cap);
    };
    if constexpr (cached) copies_wait();
    for (; p + (kPacks - 1) * step < mine.end; p += kPacks * step, from += kPacks * step) take(std::true_type{});
    if (p < mine.end) take(std::false_type{});
    mine.edges([&](int edge) {
      const P batch[1] = {x.load_edge(edge)};
      add_packs<T, plain>(sums, batch, cap, [&](int, int i) { return x.inside(edge, i); });
    });
    sums = sums_of_warp<T, plain>(sums);
    if (lane() == 0) memory.warps[turn][threadIdx.x / kWarp] = sums;
  }

  // The warps of the columns: the gradient over the logits, but for the columns of labels. As a pack has been read for
  // the last time, one of the cluster's next row takes its place.
  __device__ void write_gradient(int64_t r) const {
    constexpr int kPacks = cached ? 1 : std::min(2, kBatch<T, plain>);  // shared memory is quick
    const RowPacks<T> x = row(r);
    const Slice mine(x, blocks, rank);
    const RowResult<A> result = memory.result;
    Words4* to = x.whole_packs() + mine.mine();
    const Words4* from = cached ? cache + threadIdx.x : to;
    Copies copies = copies_of(r + clusters);
    if (result.terms.nothing) {
      for (int p = mine.mine(); p < mine.end; p += step, to += step) store_global(to, Words4{0, 0, 0, 0});
    } else {
      for (int p = mine.mine(); p < mine.end; p += kPacks * step, to += kPacks * step, from += kPacks * step) {
        P batch[kPacks];
#pragma unroll
        for (int b = 0; b < kPacks; ++b) {
          if (p + b * step < mine.end) batch[b] = P::of(from[b * step]);
        }
#pragma unroll
        for (int b = 0; b < kPacks; ++b) {
          if (p + b * step < mine.end) {
            store_global(to + b * step, gradient_pack<T, plain>(batch[b], result, cap).four());
          }
        }
        if constexpr (cached) copies.next();
      }
    }
    if constexpr (cached) copies.rest();
    mine.edges([&](int p) {
      x.store_edge(p, result.terms.nothing ? P{} : gradient_pack<T, plain>(x.load_edge(p), result, cap));
    });
  }

  // The warp of the labels: the labels of a row and their logits.
  __device__ void read_labels(int64_t r, int turn) const {
    if (blocks > 1 && lane() == 0) mailbox_expect(&memory.boxes[turn], blocks * static_cast<int>(sizeof(RowSums<A>)));
    read_targets(a, r, row(r).x, targets + turn * a.bag_size);
  }

  // The warp of the labels: the end of the cluster's k-th row, from the sums of its columns.
  __device__ void finish(int64_t r, int k) const {
    const int turn = k % 2;
    RowSums<A> sums = sums_of<T, plain>(memory.warps[turn], step / kWarp);
    if (blocks > 1) {
      // From now on another block may overwrite the logits that read_labels has read.
      const A values[4] = {sums.maximum, sums.exps, sums.logits, sums.columns};  // in their order in memory
      if (lane() < blocks) {
        mail(narrowed<A>(values).words, &memory.blocks[turn][rank], &memory.boxes[turn], static_cast<unsigned>(lane()));
      }
    }
    if (gradient && k > 0) write_labels(r - clusters, 1 - turn);
    if (blocks > 1) {  // all blocks wait, so that none mails two rows ahead
      mailbox_wait(&memory.boxes[turn], k / 2);
      sums = sums_of<T, plain>(memory.blocks[turn], blocks);
    }
    if (gradient || rank == 0) {
      const RowResult<A> result = finish_row(a, r, sums, targets + turn * a.bag_size, rank == 0);
      warp_barrier();  // all lanes have read the result of the row before
      if (lane() == 0) memory.result = result;
    }
  }

  // The warp of the labels: their columns in this block's slice. From the saved logit and rounded once: subtracting
  // from a probability already rounded to bfloat16 turns p = 0.999 into a zero gradient.
  __device__ void write_labels(int64_t r, int turn) const {
    const RowResult<A> result = memory.result;
    if (result.terms.nothing) return;
    const RowPacks<T> x = row(r);
    const Slice mine(x, blocks, rank);
    for (int i = lane(); i < a.bag_size; i += kWarp) {
      const Target<A>& t = targets[turn * a.bag_size + i];
      if (!t.leads || x.pack_of(t.label) < mine.first || x.pack_of(t.label) >= mine.last) continue;
      A d = result.terms.factor * power<T>(t.logit - result.maximum) - result.terms.pull * t.pull;
      if (t.logit > -static_cast<A>(INFINITY)) d -= result.terms.uniform;
      if (cap != 0) d *= 1 - (t.logit / cap) * (t.logit / cap);
      narrow(d, x.x[t.label]);
    }
  }
};

template <typename T, bool plain, Pass pass>
__global__ void __launch_bounds__(kMaxThreads) loss_rows_kernel(const LossRows<T> a) {
  TST_SHARED_MEMORY(shared);
  const RowBlock<T, plain, pass> block(a, shared);
  const bool has_columns = threadIdx.x < blockDim.x - kWarp;
  if (block.blocks > 1) {
    if (threadIdx.x == 0) mailbox_open(&block.memory.boxes[0]), mailbox_open(&block.memory.boxes[1]);
    cluster_barrier();  // nobody mails before the boxes are open
  }
  if (block.cached && has_columns) block.copies_of(block.first).rest();
  int k = 0;
  for (int64_t r = block.first; r < a.rows; r += block.clusters, ++k) {
    if (has_columns)
      block.sum_up(r, k % 2);
    else
      block.read_labels(r, k % 2);
    __syncthreads();  // publishes the sums, and the gradient of the row before
    if (!has_columns) block.finish(r, k);
    if constexpr (block.gradient) {
      __syncthreads();  // publishes the result
      if (has_columns) block.write_gradient(r);
    }
  }
  if constexpr (block.gradient) {
    __syncthreads();  // publishes the last row's gradient
    if (!has_columns) block.write_labels(block.first + (k - 1) * block.clusters, (k - 1) % 2);
  }
}

// Bytes of dynamic shared memory beside the cached slice.
template <typename T>
constexpr int64_t loss_rows_memory(int64_t bag_size) {
  return static_cast<int64_t>(sizeof(RowMemory<Acc<T>>)) + 2 * bag_size * static_cast<int64_t>(sizeof(Target<Acc<T>>));
}

// Bytes of the longest slice of a row of `vocabulary` columns at any alignment.
template <typename T>
constexpr int64_t slice_bytes(int64_t vocabulary, int64_t blocks) {
  const int64_t packs = (vocabulary + kPack<T> - 1 + kPack<T> - 1) / kPack<T>;  // the head: at most kPack - 1
  return (packs + blocks - 1) / blocks * 16;
}

}  // namespace tst::cuda
