// The row kernel of the loss on CUDA: log-sum-exp, loss, and the logits overwritten by their gradient. Raw pointers, no
// torch header. The formulas are those of cpu/kernels.h.
#pragma once

#include <cmath>

#include "device.h"

namespace tst::cuda {

enum class Objective : int { kMce, kMceAlt };

constexpr int kMaxThreads = 512;  // 1024 would leave 64 registers, which softcap and smoothing exceed

template <typename T>
struct LossRows {
  T* logits;       // [rows, vocabulary]
  int64_t stride;  // of rows, in elements
  int vocabulary;
  const int64_t* labels;  // [rows, bag_size], each in [0, vocabulary) or ignore_index
  int bag_size;
  int64_t ignore_index;
  const Acc<T>* position_scale;  // [bag_size]
  Objective objective;
  double logit_softcap;
  double z_loss;
  double label_smoothing;
  const Acc<T>* grad_loss;   // [rows], or one for all with grad_loss_stride 0; nullptr: 1
  int64_t grad_loss_stride;  // 0 or 1
  const Acc<T>* grad_lse;    // [rows]; nullptr: 0
  Acc<T>* loss;              // [rows]
  Acc<T>* lse;               // [rows]
  int cache_bytes;           // of a block's slice of the row in shared memory; 0: the gradient reads the row again
};

// Of the columns seen so far; kernels.h has the same for the CPU.
template <typename A>
struct RowSums {
  A maximum;  // m, of z
  A exps;     // sum_v exp(z_v - m)
  A logits;   // sum of z_v - m where z_v > -inf, and the number of those, for smoothing only
  A columns;
};

struct Target {  // a label of the row
  int label;     // -1: counts for nothing
  bool leads;    // first of its kind in the bag: it stands for all of them
  double weight;
  double logit;  // z
  double pull;   // a_v of kernels.h, of a leader
};

struct RowResult {
  double maximum, factor, uniform, pull_factor;
  bool nothing;
};

template <typename A>
struct alignas(16) RowMemory {  // shared, before the cached slice and the targets
  A maximum[kWarp];
  double exps[kWarp], logits[kWarp], columns[kWarp];
  RowSums<double> block;  // which the other blocks of the cluster read
  RowResult result;
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
  template <bool whole>
  __device__ Pack<T, kPack<T>> load(int p) const {
    if constexpr (whole) {
      return *reinterpret_cast<const Pack<T, kPack<T>>*>(x + begin(p));
    } else {
      Pack<T, kPack<T>> pack{};
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (inside(p, i)) pack.values[i] = x[begin(p) + i];
      }
      return pack;
    }
  }
  template <bool whole>
  __device__ void store(int p, const Pack<T, kPack<T>>& pack) const {
    if constexpr (whole) {
      *reinterpret_cast<Pack<T, kPack<T>>*>(x + begin(p)) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (inside(p, i)) x[begin(p) + i] = pack.values[i];
      }
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
  // Calls f with each pack of this thread, the same at every call, and whether it is a whole one as a type.
  template <typename F>
  __device__ void each(F f) const {
    for (int p = begin + static_cast<int>(threadIdx.x); p < end; p += blockDim.x) f(p, std::true_type{});
    each_edge(f);
  }
  template <typename F>
  __device__ void each_edge(F f) const {
    if (threadIdx.x != 0) return;
    for (int p = first; p < begin; ++p) f(p, std::false_type{});
    for (int p = max(begin, end); p < last; ++p) f(p, std::false_type{});
  }
};

template <typename A>
__device__ inline A capped(A x, A cap) {
  return cap == 0 ? x : cap * tanh(x / cap);
}

// exp(-inf - m) is 0 for any m but -inf: where there is nothing but -inf yet, differences are taken from 0.
template <typename A>
__device__ inline A base_of(A maximum) {
  return maximum == -static_cast<A>(INFINITY) ? A(0) : maximum;
}

template <typename T, bool plain, bool whole>
__device__ inline void add_pack(RowSums<Acc<T>>& sums, const RowPacks<T>& row, int p, const Pack<T, kPack<T>>& pack,
                                Acc<T> cap) {
  using A = Acc<T>;
  constexpr A kLowest = -static_cast<A>(INFINITY);
  A z[kPack<T>], best = sums.maximum;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    z[i] = plain ? widen(pack.values[i]) : capped(widen(pack.values[i]), cap);
    if (!whole && !row.inside(p, i)) z[i] = kLowest;
    best = z[i] > best ? z[i] : best;  // a NaN is nobody's maximum, and shows in the sum
  }
  if (best > sums.maximum) {  // seldom after the first packs
    sums.exps *= exponential<T>(sums.maximum - best);
    if (!plain && sums.columns > 0) sums.logits += sums.columns * (sums.maximum - best);
    sums.maximum = best;
  }
  const A base = base_of(best);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    sums.exps += exponential<T>(z[i] - base);
    if (!plain && z[i] > kLowest) {
      sums.logits += z[i] - base;
      sums.columns += 1;
    }
  }
}

// The block's sums from its threads', the same in all threads: moved to the block's maximum once, then added in double.
template <typename T, bool plain>
__device__ inline RowSums<double> sums_of_block(const RowSums<Acc<T>>& mine, RowMemory<Acc<T>>& memory) {
  using A = Acc<T>;
  const auto add = [](double a, double b) { return a + b; };
  const A m = block_reduce(mine.maximum, memory.maximum, [](A a, A b) { return a > b ? a : b; });
  const A shift = mine.maximum - base_of(m);  // -inf where a thread saw nothing: its sums are 0, or NaN
  RowSums<double> out{m, 0, 0, 0};
  out.exps = block_reduce(double(mine.exps * exponential<T>(mine.maximum == m ? A(0) : shift)), memory.exps, add);
  if constexpr (!plain) {
    const A logits = mine.columns > 0 ? mine.logits + mine.columns * shift : A(0);
    out.logits = block_reduce(double(logits), memory.logits, add);
    out.columns = block_reduce(double(mine.columns), memory.columns, add);
  }
  return out;
}

// One thread: the sums of all blocks in the order of their ranks.
__device__ inline RowSums<double> sums_of_cluster(const RowSums<double>* block) {
  RowSums<double> total = *cluster_shared(block, 0);
  for (unsigned rank = 1; rank < cluster_size(); ++rank) {
    const RowSums<double> other = *cluster_shared(block, rank);
    const double m = other.maximum > total.maximum ? other.maximum : total.maximum, base = base_of(m);
    total.exps = (total.maximum == m ? total.exps : total.exps * exp(total.maximum - base)) +
                 (other.maximum == m ? other.exps : other.exps * exp(other.maximum - base));
    if (total.columns > 0) total.logits += total.columns * (total.maximum - base);
    if (other.columns > 0) total.logits += other.logits + other.columns * (other.maximum - base);
    total.columns += other.columns;
    total.maximum = m;
  }
  return total;
}

// Reads the labels and their logits, which the gradient overwrites later.
template <typename T>
__device__ inline void read_targets(const LossRows<T>& a, int64_t r, const T* x, Target* targets) {
  for (int i = threadIdx.x; i < a.bag_size; i += blockDim.x) {
    Target target{-1, false, 0, 0, 0};
    const int64_t y = a.labels[r * a.bag_size + i];
    if (y != a.ignore_index) {
      assert(y >= 0 && y < a.vocabulary && "labels: out of range");
      target.weight = a.position_scale[i];
      if (target.weight != 0) {
        target.label = static_cast<int>(y);
        target.logit = capped(widen(x[y]), static_cast<Acc<T>>(a.logit_softcap));
      }
    }
    targets[i] = target;
  }
}

// Finds the leaders; every thread its own labels, s comparisons each.
__device__ inline void find_leaders(Target* targets, int bag_size) {
  for (int i = threadIdx.x; i < bag_size; i += blockDim.x) {
    const int label = targets[i].label;
    bool leads = label >= 0;
    double pull = 0;
    for (int j = 0; j < bag_size; ++j) {
      if (targets[j].label != label) continue;
      pull += targets[j].weight;
      if (j < i) leads = false;
    }
    targets[i].leads = leads;
    targets[i].pull = leads ? pull : 0;
  }
}

// One thread of each block, from the row's sums; that of rank 0 writes loss and lse.
template <typename T>
__device__ inline RowResult finish_row(const LossRows<T>& a, int64_t r, const RowSums<double>& sums, Target* targets,
                                       bool write) {
  const bool set = a.objective == Objective::kMceAlt;
  const double m = sums.maximum, log_sum = log(sums.exps), lse = m + log_sum, smoothing = a.label_smoothing;
  double scale = 0, best = -INFINITY, total = 0, fit = 0;
  for (int i = 0; i < a.bag_size; ++i) {
    const Target& t = targets[i];
    if (t.label < 0) continue;
    scale = set ? double(a.position_scale[0]) : scale + t.weight;
    // Differences from m rather than from lse: lse near 1e4 would cost three digits in float32.
    if (t.leads && !set) fit += t.pull * ((m - t.logit) + log_sum);
    best = t.logit > best ? t.logit : best;
  }
  if (set) {
    for (int i = 0; i < a.bag_size; ++i) {
      if (targets[i].leads) total += targets[i].pull = targets[i].logit == best ? 1.0 : exp(targets[i].logit - best);
    }
    for (int i = 0; i < a.bag_size; ++i) {
      if (targets[i].leads) targets[i].pull *= scale / total;
    }
    const double nll = (m - best) + log_sum - log(total);
    fit = scale * (nll < 0 ? 0.0 : nll);  // the labels are part of the vocabulary: below 0 only by rounding
  }
  if (write) {
    double loss = (1 - smoothing) * fit + a.z_loss * scale * lse * lse;
    if (smoothing != 0) loss += smoothing * scale * (log_sum - sums.logits / sums.columns);
    a.loss[r] = static_cast<Acc<T>>(scale == 0 ? 0.0 : loss);
    a.lse[r] = static_cast<Acc<T>>(lse);
  }
  const double g = a.grad_loss ? double(a.grad_loss[r * a.grad_loss_stride]) : 1.0;
  const double u = a.grad_lse ? double(a.grad_lse[r]) : 0.0;
  RowResult result;
  result.maximum = m;
  result.factor = (g * scale * (1 + 2 * a.z_loss * lse) + u) / sums.exps;
  result.uniform = smoothing == 0 ? 0.0 : g * smoothing * scale / sums.columns;
  result.pull_factor = g * (1 - smoothing);
  result.nothing = (scale == 0 || g == 0) && u == 0;  // nothing to learn, whatever the row's logits are
  return result;
}

// x_v <- factor * exp(z_v - m), without `plain` minus `uniform` where z_v > -inf, times the derivative of the cap.
template <typename T, bool plain>
__device__ inline Pack<T, kPack<T>> gradient_pack(const Pack<T, kPack<T>>& pack, const RowResult& row, Acc<T> cap) {
  using A = Acc<T>;
  const A m = static_cast<A>(row.maximum), factor = static_cast<A>(row.factor), uniform = static_cast<A>(row.uniform);
  A out[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    A z = widen(pack.values[i]);
    if constexpr (plain) {
      out[i] = factor * exponential<T>(z - m);
    } else {
      z = capped(z, cap);
      const A t = cap == 0 ? A(0) : z / cap;
      out[i] = (factor * exponential<T>(z - m) - (z > -static_cast<A>(INFINITY) ? uniform : A(0))) * (A(1) - t * t);
    }
  }
  return narrowed<T>(out);
}

// A cluster of blocks a row, a slice of its columns each; one block where there are no clusters. `plain`: no softcap,
// no smoothing. With a gradient the slice waits in shared memory meanwhile, where it fits: the logits then cross the
// memory bus once in each direction.
template <typename T, bool plain, bool gradient>
__global__ void __launch_bounds__(kMaxThreads) loss_rows_kernel(const LossRows<T> a) {
  using A = Acc<T>;
  constexpr int kBatch = 4;  // loads in flight a thread
  TST_SHARED_MEMORY(raw);
  RowMemory<A>& memory = *reinterpret_cast<RowMemory<A>*>(raw);
  Pack<T, kPack<T>>* cache = reinterpret_cast<Pack<T, kPack<T>>*>(raw + sizeof(RowMemory<A>));
  Target* targets = reinterpret_cast<Target*>(raw + sizeof(RowMemory<A>) + a.cache_bytes);
  const int blocks = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int64_t r = blockIdx.x / blocks;
  const RowPacks<T> row(a.logits + r * a.stride, a.vocabulary);
  const Slice slice(row, blocks, rank);
  const A cap = static_cast<A>(a.logit_softcap);

  read_targets(a, r, row.x, targets);
  RowSums<A> mine{-static_cast<A>(INFINITY), 0, 0, 0};
  const auto take = [&](int p, const Pack<T, kPack<T>>& pack, auto whole) {
    if (gradient && a.cache_bytes) cache[p - slice.first] = pack;
    add_pack<T, plain, whole()>(mine, row, p, pack, cap);
  };
  const int step = static_cast<int>(blockDim.x);
  int p = slice.begin + static_cast<int>(threadIdx.x);
  for (; p + (kBatch - 1) * step < slice.end; p += kBatch * step) {
    Pack<T, kPack<T>> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) batch[b] = row.template load<true>(p + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) take(p + b * step, batch[b], std::true_type{});
  }
  for (; p < slice.end; p += step) take(p, row.template load<true>(p), std::true_type{});
  slice.each_edge([&](int q, auto whole) { take(q, row.template load<false>(q), whole); });
  const RowSums<double> block = sums_of_block<T, plain>(mine, memory);  // its barriers publish the targets
  find_leaders(targets, a.bag_size);
  if (threadIdx.x == 0) memory.block = block;
  // Publishes the sums and the leaders; and no label's logit is overwritten before all blocks have read theirs.
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0 && (gradient || rank == 0)) {
    memory.result = finish_row(a, r, sums_of_cluster(&memory.block), targets, rank == 0);
  }
  cluster_arrive();  // after the reads of other blocks' memory
  if constexpr (gradient) {
    __syncthreads();
    const RowResult result = memory.result;
    if (result.nothing) {
      slice.each([&](int q, auto whole) { row.template store<whole()>(q, {}); });
    } else {
      slice.each([&](int q, auto whole) {
        const Pack<T, kPack<T>> pack = a.cache_bytes ? cache[q - slice.first] : row.template load<whole()>(q);
        row.template store<whole()>(q, gradient_pack<T, plain>(pack, result, cap));
      });
      __syncthreads();
      for (int i = threadIdx.x; i < a.bag_size; i += blockDim.x) {
        const Target& t = targets[i];
        if (!t.leads || row.pack_of(t.label) < slice.first || row.pack_of(t.label) >= slice.last) continue;
        // From the saved logit and rounded once: subtracting from a probability already rounded to bfloat16 turns
        // p = 0.999 into a zero gradient.
        double d = result.factor * exp(t.logit - result.maximum) - result.pull_factor * t.pull;
        if (t.logit > -INFINITY) d -= result.uniform;
        if (a.logit_softcap != 0) d *= 1 - (t.logit / a.logit_softcap) * (t.logit / a.logit_softcap);
        narrow(static_cast<A>(d), row.x[t.label]);
      }
    }
  }
  cluster_wait();  // no block leaves while another reads its memory
}

// Bytes of dynamic shared memory beside the cached slice.
template <typename T>
constexpr int64_t loss_rows_memory(int64_t bag_size) {
  return static_cast<int64_t>(sizeof(RowMemory<Acc<T>>)) + bag_size * static_cast<int64_t>(sizeof(Target));
}

// Bytes of the longest slice of a row of `vocabulary` columns at any alignment.
template <typename T>
constexpr int64_t slice_bytes(int64_t vocabulary, int64_t blocks) {
  const int64_t packs = (vocabulary + kPack<T> - 1 + kPack<T> - 1) / kPack<T>;  // the head: at most kPack - 1
  return (packs + blocks - 1) / blocks * 16;
}

}  // namespace tst::cuda
