// The kernels of the bag embedding on CUDA, forward and backward. Raw pointers, no torch header.
//
// Backward, deterministic: (id, place) are sorted by id, stably. Each row of the table then has its hits side by side,
// in the order of the batch. Rows with at most kWindow hits, most of them none, are summed and written by one warp each
// and slab of columns: a row without hits becomes zeros, so there is no memset. Zipf-distributed text
// (p(k) ~ 1/k) gives its first token 8 % of all hits; the hits of such long rows are cut at multiples of kWindow,
// summed apart, and joined in order. How many pieces there are depends on the ids, so one is launched for all that
// there could be: nothing waits for the host.
#pragma once

#include "device.h"

namespace tst::cuda {

// Packs a lane holds: a warp's slab is 32 lanes x 2 packs forward, 512 columns of bfloat16, and 256 backward.
constexpr int kForwardPacks = 2, kBackwardPacks = 1;
constexpr int kInFlight = 2;  // rows whose packs are under way at a time; more where few warps have long lists
constexpr int kWindow = 64;   // hits

template <int n, int packs>
constexpr int kSlab = kWarp * packs * n;  // columns of a warp

// A row of the source and what it counts; row -1 is none.
template <typename A>
struct Term {
  int row;
  A coefficient;
};

// A warp adds the terms k in [begin, end) in order, for its slab of columns. Each lane finds one of 32 terms at a time
// and all take it from there: 32 ids come with one load, not one after the other. Without `weighted` each counts 1.
template <bool weighted, int in_flight = kInFlight, typename T, int unroll, int n, typename TermOf>
__device__ inline void gather(const T* source, int64_t dim, int64_t column, int begin, int end, TermOf term,
                              Acc<T> (&sum)[unroll][n]) {
  using A = Acc<T>;
  // Unsigned: an int would overflow where there are almost 2^31 terms.
  for (uint32_t next = begin; next < static_cast<uint32_t>(end); next += kWarp) {
    const int first = static_cast<int>(next), count = min(end - first, kWarp);
    const Term<A> mine = lane() < count ? term(first + lane()) : Term<A>{-1, 0};
    for (int k = 0; k < count; k += in_flight) {
      int rows[in_flight];
      A w[in_flight];
      Pack<T, n> packs[in_flight][unroll];
#pragma unroll
      for (int b = 0; b < in_flight; ++b) {
        const int row = shuffle(mine.row, (k + b) % kWarp);
        rows[b] = k + b < count ? row : -1;
        if (weighted) w[b] = shuffle(mine.coefficient, (k + b) % kWarp);
      }
#pragma unroll
      for (int b = 0; b < in_flight; ++b) {
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          const int64_t c = column + u * kWarp * n;
          if (rows[b] >= 0 && c < dim) packs[b][u] = load<T, n>(source + rows[b] * dim + c);
        }
      }
#pragma unroll
      for (int b = 0; b < in_flight; ++b) {
        if (rows[b] < 0) continue;
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          if (column + u * kWarp * n >= dim) continue;
#pragma unroll
          for (int i = 0; i < n; ++i) sum[u][i] += weighted ? w[b] * packs[b][u][i] : packs[b][u][i];
        }
      }
    }
  }
}

template <bool last_use = false, typename O, int unroll, int n>
__device__ inline void put(O* row, int64_t dim, int64_t column, Acc<O> scale, Acc<O> (&sum)[unroll][n]) {
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const int64_t c = column + u * kWarp * n;
    if (c >= dim) continue;
#pragma unroll
    for (int i = 0; i < n; ++i) sum[u][i] *= scale;
    store<last_use>(row + c, narrowed<O>(sum[u]));
  }
}

// Which of the rows of work this warp has, and the first of its lane's columns. Slabs are the grid's slow dimension:
// the rows that many bags read come from the second-level cache, a slab at a time.
__device__ inline int64_t warp_row() { return blockIdx.x * int64_t(blockDim.x / kWarp) + threadIdx.x / kWarp; }
template <int n, int packs>
__device__ inline int64_t lane_column() {
  return int64_t(blockIdx.y) * kSlab<n, packs> + lane() * n;
}

// How the ids of a bag count. Without `weighted` all alike: scale * sum.
struct Pooling {
  int bag_size;
  bool mean;
  bool padded;
  int64_t padding_idx;
  const double* position_weights;  // [bag_size], or nullptr: all 1

  __device__ double weight(const int64_t* bag, int i) const {
    if (padded && bag[i] == padding_idx) return 0;
    return position_weights ? position_weights[i] : 1;
  }
  // What a weight of the bag is multiplied by; infinite, and never used, where all are 0.
  __device__ double scale(const int64_t* bag) const {
    if (!mean) return 1;
    double total = 0;
    for (int i = 0; i < bag_size; ++i) total += weight(bag, i);
    return 1 / total;
  }
};

template <typename T>
struct BagForward {
  const int64_t* ids;  // [bags, bag_size]
  const T* weight;     // [rows, dim]
  T* out;              // [bags, dim]
  int64_t bags, rows, dim;
  Pooling pooling;
};

// One warp per bag and slab.
template <typename T, int n, bool weighted>
__global__ void __launch_bounds__(128) bag_embedding_kernel(const BagForward<T> a) {
  using A = Acc<T>;
  const int64_t bag = warp_row(), column = lane_column<n, kForwardPacks>();
  if (bag >= a.bags) return;
  const Pooling& pool = a.pooling;
  const int64_t* ids = a.ids + bag * pool.bag_size;
  const double scale = weighted ? pool.scale(ids) : 1.0 / (pool.mean ? pool.bag_size : 1);
  const auto term = [&](int k) -> Term<A> {
    const int64_t id = ids[k];
    if (weighted && pool.padded && id == pool.padding_idx) return {-1, 0};
    assert(id >= 0 && id < a.rows && "input_ids: out of range");
    if (!weighted) return {static_cast<int>(id), 1};
    const double w = pool.weight(ids, k);
    // A row that counts 0 is not read: 0 times its infinity would be NaN.
    return {w == 0 ? -1 : static_cast<int>(id), static_cast<A>(w * scale)};
  };
  A sum[kForwardPacks][n] = {};
  gather<weighted>(a.weight, a.dim, column, 0, pool.bag_size, term, sum);
  put(a.out + bag * a.dim, a.dim, column, weighted ? A(1) : static_cast<A>(scale), sum);
}

// ---- backward ---------------------------------------------------------------------------------------------------

struct BagHits {
  const int64_t* ids;  // [bags, bag_size]
  int64_t bags, rows;
  Pooling pooling;
  uint32_t* keys;    // [bags * bag_size]: id, or `rows` for what counts for nothing
  uint32_t* places;  // [bags * bag_size]: bag, or with `weighted` the place in ids
  double* scales;    // [bags], only with `weighted`
  int* longs;        // [1]: 0 to begin with
};

// One thread per bag.
template <bool weighted>
__global__ void bag_hits_kernel(const BagHits a) {
  const int64_t bag = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (bag >= a.bags) return;
  if (bag == 0) *a.longs = 0;
  const Pooling& pool = a.pooling;
  const int64_t* ids = a.ids + bag * pool.bag_size;
  for (int i = 0; i < pool.bag_size; ++i) {
    const int64_t place = bag * pool.bag_size + i;
    const bool padding = weighted && pool.padded && ids[i] == pool.padding_idx;
    assert((padding || (ids[i] >= 0 && ids[i] < a.rows)) && "input_ids: out of range");
    const bool counts = !weighted || pool.weight(ids, i) != 0;
    a.keys[place] = static_cast<uint32_t>(counts ? ids[i] : a.rows);
    a.places[place] = static_cast<uint32_t>(weighted ? place : bag);
  }
  if (weighted) a.scales[bag] = pool.scale(ids);
}

// offsets[v]: the first of the sorted keys that is not below v, for v = 0 to rows. By bisection, 17 reads for 98304
// keys: from the keys' side one thread would have to fill the whole gap behind the largest id.
__device__ inline int first_not_below(const uint32_t* keys, int count, uint32_t v) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (keys[middle] < v)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// longs: how many rows are long, and which, in any order.
static __global__ void bag_offsets_kernel(const uint32_t* keys, int count, int64_t rows, int* offsets, int* longs) {
  const int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (v > rows) return;
  const int first = first_not_below(keys, count, static_cast<uint32_t>(v));
  offsets[v] = first;
  if (v < rows && count - first > kWindow && keys[first + kWindow] == v)
    longs[1 + count_up(longs)] = static_cast<int>(v);
}

template <typename T>
struct BagBackward {
  const T* grad;           // [bags, dim]
  const uint32_t* keys;    // [count], sorted
  const uint32_t* places;  // [count], with the keys
  const int* offsets;      // [rows + 1]
  const int* longs;        // [1 + long rows]
  const double* scales;    // [bags], only with `weighted`
  T* out;                  // [rows, dim]
  Acc<T>* pieces;          // [piece_count, dim]
  int64_t piece_count;     // two a window, or none where no row can be long
  int64_t rows, dim;
  int count;
  Pooling pooling;

  __device__ Acc<T> scale() const { return static_cast<Acc<T>>(pooling.mean ? 1.0 / pooling.bag_size : 1.0); }
};

// The sum of hits [begin, end) in `sum`, without the common scale.
template <typename T, int n, bool weighted>
__device__ inline void add_hits(const BagBackward<T>& a, int64_t column, int begin, int end,
                                Acc<T> (&sum)[kBackwardPacks][n]) {
  using A = Acc<T>;
  const uint32_t s = a.pooling.bag_size;
  const double* weights = a.pooling.position_weights;
  const auto term = [&](int k) -> Term<A> {
    const uint32_t place = a.places[k];
    if (!weighted) return {static_cast<int>(place), 1};
    const uint32_t bag = place / s;
    return {static_cast<int>(bag), static_cast<A>((weights ? weights[place % s] : 1.0) * a.scales[bag])};
  };
  gather<weighted>(a.grad, a.dim, column, begin, end, term, sum);
}

// The hits of a piece: of the long row that a window's first hit belongs to, or its last. A window touches two at most.
template <typename T>
__device__ inline bool hits_of_piece(const BagBackward<T>& a, int64_t piece, int& begin, int& end) {
  const int64_t start = piece / 2 * kWindow;
  const int stop = static_cast<int>(min(start + kWindow, int64_t(a.count)));
  const uint32_t v = a.keys[piece % 2 ? stop - 1 : start];
  if (v >= a.rows || (piece % 2 && v == a.keys[start])) return false;
  begin = a.offsets[v], end = a.offsets[v + 1];
  if (end - begin <= kWindow) return false;
  begin = max(begin, static_cast<int>(start)), end = min(end, stop);
  return true;
}

// One warp per piece and slab, then one per kRows rows of the table and slab, long rows left out. In one launch: alone,
// the pieces are too few to keep a device busy. A warp's rows lie far apart, so that none has all frequent ones. They
// leave the second-level cache first, to the gradient's rows. Together 10 to 18 % faster on an H100. With weights 10
// blocks on a multiprocessor leave too few registers: on sm_90a nvcc 13.0 would spill.
constexpr int kRows = 4;

template <typename T, int n, bool weighted>
__global__ void __launch_bounds__(128, weighted ? 9 : 10) bag_rows_kernel(const BagBackward<T> a) {
  const int64_t piece = warp_row(), first = piece - a.piece_count, column = lane_column<n, kBackwardPacks>();
  const int64_t apart = (a.rows + kRows - 1) / kRows;
  if (first >= apart) return;
  if (first < 0) {
    int begin, end;
    if (!hits_of_piece(a, piece, begin, end)) return;
    Acc<T> sum[kBackwardPacks][n] = {};
    add_hits<T, n, weighted>(a, column, begin, end, sum);
    put(a.pieces + piece * a.dim, a.dim, column, Acc<T>(1), sum);
    return;
  }
  const int64_t looked_up = first + lane() % kRows * apart;  // a lane a row: all offsets come with one load
  int hits = 0;
  if (lane() < 2 * kRows && looked_up < a.rows) hits = a.offsets[looked_up + lane() / kRows];
#pragma unroll 1
  for (int k = 0; k < kRows; ++k) {
    const int begin = shuffle(hits, k), end = shuffle(hits, k + kRows);
    const int64_t v = first + k * apart;
    if (v >= a.rows) return;
    if (end - begin > kWindow) continue;
    Acc<T> sum[kBackwardPacks][n] = {};
    add_hits<T, n, weighted>(a, column, begin, end, sum);
    put<true>(a.out + v * a.dim, a.dim, column, weighted ? Acc<T>(1) : a.scale(), sum);
  }
}

// One block per long row and slab of 32 packs at a time: its warps add up parts of the pieces, the first warp the
// parts. One warp a row took 22 to 35 microseconds, for a row with 8 % of the hits.
constexpr int kJoinWarps = 8;

template <typename T, int n>
constexpr int kJoinMemory = kJoinWarps * kWarp * n * static_cast<int>(sizeof(Acc<T>));  // bytes

template <typename T, int n, bool weighted>
__global__ void __launch_bounds__(kJoinWarps* kWarp) bag_join_kernel(const BagBackward<T> a) {
  using A = Acc<T>;
  TST_SHARED_MEMORY(shared);
  A* const parts = reinterpret_cast<A*>(shared);  // [kJoinWarps, n, kWarp]
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t column = (int64_t(blockIdx.y) * kWarp + lane()) * n;
  for (int k = static_cast<int>(blockIdx.x); k < a.longs[0]; k += static_cast<int>(gridDim.x)) {
    const int v = a.longs[1 + k], begin = a.offsets[v], first = begin / kWindow,
              last = (a.offsets[v + 1] - 1) / kWindow + 1;
    // Of its first window it has the second piece, unless it fills the window.
    const auto piece = [&](int w) { return Term<A>{2 * w + (w == first && begin % kWindow > 0), 1}; };
    const int each = (last - first + kJoinWarps - 1) / kJoinWarps, from = min(first + warp * each, last);
    A sum[1][n] = {};
    gather<false, 4>(static_cast<const A*>(a.pieces), a.dim, column, from, min(from + each, last), piece, sum);
#pragma unroll
    for (int i = 0; i < n; ++i) parts[(warp * n + i) * kWarp + lane()] = sum[0][i];
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        for (int p = 1; p < kJoinWarps; ++p) sum[0][i] += parts[(p * n + i) * kWarp + lane()];
      }
      put(a.out + v * a.dim, a.dim, column, weighted ? A(1) : a.scale(), sum);
    }
    __syncthreads();  // before the next row's parts
  }
}

}  // namespace tst::cuda
