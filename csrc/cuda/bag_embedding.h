// The kernels of the bag embedding on CUDA, forward and backward. Raw pointers, no torch header.
//
// Backward, deterministic: (id, place) are sorted by id, stably. Each row of the table then has its hits side by side,
// in the order of the batch. Rows with at most kWindow hits, most of them none, are summed and written by one warp a
// slab of columns: a row without hits becomes zeros, so there is no memset. Zipf-distributed text
// (p(k) ~ 1/k) gives its first token 8 % of all hits; the hits of such long rows are cut at multiples of kWindow,
// summed apart, and joined in order. How many pieces there are depends on the ids, so one is launched for all that
// there could be: nothing waits for the host.
#pragma once

#include "device.h"

namespace tst::cuda {

constexpr int kUnroll = 2;    // packs a lane holds: a warp's slab is 32 lanes x 2 packs, 512 columns of bfloat16
constexpr int kInFlight = 2;  // rows whose packs are under way at a time; more where few warps have long lists
constexpr int kWindow = 64;   // hits

template <int n>
constexpr int kSlab = kWarp * kUnroll * n;  // columns of a warp

// A row of the source and what it counts; row -1 is none.
template <typename A>
struct Term {
  int64_t row;
  A coefficient;
};

// A warp adds the terms k in [begin, end) in order, for its slab of columns. Each lane finds one of 32 terms at a time
// and all take it from there: 32 ids come with one load, not one after the other.
template <typename T, int n, int in_flight = kInFlight, typename TermOf>
__device__ inline void gather(const T* source, int64_t dim, int64_t column, int64_t begin, int64_t end, TermOf term,
                              Acc<T> (&sum)[kUnroll][n]) {
  using A = Acc<T>;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int count = static_cast<int>(min(end - first, int64_t(kWarp)));
    const int lane = threadIdx.x % kWarp;
    const Term<A> mine = lane < count ? term(first + lane) : Term<A>{-1, 0};
    for (int k = 0; k < count; k += in_flight) {
      int64_t rows[in_flight];
      A w[in_flight];
      Pack<T, n> packs[in_flight][kUnroll];
#pragma unroll
      for (int b = 0; b < in_flight; ++b) {
        const int64_t row = shuffle(mine.row, (k + b) % kWarp);
        rows[b] = k + b < count ? row : -1;
        w[b] = shuffle(mine.coefficient, (k + b) % kWarp);
      }
#pragma unroll
      for (int b = 0; b < in_flight; ++b) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t c = column + u * kWarp * n;
          if (rows[b] >= 0 && c < dim) packs[b][u] = load<T, n>(source + rows[b] * dim + c);
        }
      }
#pragma unroll
      for (int b = 0; b < in_flight; ++b) {
        if (rows[b] < 0) continue;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (column + u * kWarp * n >= dim) continue;
#pragma unroll
          for (int i = 0; i < n; ++i) sum[u][i] += w[b] * packs[b][u][i];
        }
      }
    }
  }
}

template <typename O, int n>
__device__ inline void put(O* row, int64_t dim, int64_t column, Acc<O> scale, Acc<O> (&sum)[kUnroll][n]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t c = column + u * kWarp * n;
    if (c >= dim) continue;
#pragma unroll
    for (int i = 0; i < n; ++i) sum[u][i] *= scale;
    store(row + c, narrowed<O>(sum[u]));
  }
}

// Which of the rows of work this warp has, and the first of its lane's columns. Slabs are the grid's slow dimension:
// the rows that many bags read come from the second-level cache, a slab at a time.
__device__ inline int64_t warp_row() { return blockIdx.x * int64_t(blockDim.x / kWarp) + threadIdx.x / kWarp; }
template <int n>
__device__ inline int64_t lane_column() {
  return int64_t(blockIdx.y) * kSlab<n> + threadIdx.x % kWarp * n;
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
  const int64_t bag = warp_row(), column = lane_column<n>();
  if (bag >= a.bags) return;
  const Pooling& pool = a.pooling;
  const int64_t* ids = a.ids + bag * pool.bag_size;
  const double scale = weighted ? pool.scale(ids) : 1.0 / (pool.mean ? pool.bag_size : 1);
  const auto term = [&](int64_t k) -> Term<A> {
    const int64_t id = ids[k];
    if (weighted && pool.padded && id == pool.padding_idx) return {-1, 0};
    assert(id >= 0 && id < a.rows && "input_ids: out of range");
    if (!weighted) return {id, 1};
    const double w = pool.weight(ids, static_cast<int>(k));
    // A row that counts 0 is not read: 0 times its infinity would be NaN.
    return {w == 0 ? -1 : id, static_cast<A>(w * scale)};
  };
  A sum[kUnroll][n] = {};
  gather<T, n>(a.weight, a.dim, column, 0, pool.bag_size, term, sum);
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
};

// One thread per bag.
template <bool weighted>
__global__ void bag_hits_kernel(const BagHits a) {
  const int64_t bag = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (bag >= a.bags) return;
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

static __global__ void bag_offsets_kernel(const uint32_t* keys, int count, int64_t rows, int* offsets) {
  const int64_t v = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (v <= rows) offsets[v] = first_not_below(keys, count, static_cast<uint32_t>(v));
}

template <typename T>
struct BagBackward {
  const T* grad;           // [bags, dim]
  const uint32_t* keys;    // [count], sorted
  const uint32_t* places;  // [count], with the keys
  const int* offsets;      // [rows + 1]
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
                                Acc<T> (&sum)[kUnroll][n]) {
  using A = Acc<T>;
  const uint32_t s = a.pooling.bag_size;
  const double* weights = a.pooling.position_weights;
  const auto term = [&](int64_t k) -> Term<A> {
    const uint32_t place = a.places[k];
    if (!weighted) return {place, 1};
    return {place / s, static_cast<A>((weights ? weights[place % s] : 1.0) * a.scales[place / s])};
  };
  gather<T, n>(a.grad, a.dim, column, begin, end, term, sum);
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

// One warp per piece and slab, then one per row of the table and slab, long rows left out. In one launch: alone, the
// pieces are too few to keep a device busy.
template <typename T, int n, bool weighted>
__global__ void __launch_bounds__(128) bag_rows_kernel(const BagBackward<T> a) {
  const int64_t piece = warp_row(), v = piece - a.piece_count, column = lane_column<n>();
  if (v >= a.rows) return;
  int begin, end;
  if (v < 0) {
    if (!hits_of_piece(a, piece, begin, end)) return;
  } else {
    begin = a.offsets[v], end = a.offsets[v + 1];
    if (end - begin > kWindow) return;
  }
  Acc<T> sum[kUnroll][n] = {};
  add_hits<T, n, weighted>(a, column, begin, end, sum);
  if (v < 0)
    put(a.pieces + piece * a.dim, a.dim, column, Acc<T>(1), sum);
  else
    put(a.out + v * a.dim, a.dim, column, weighted ? Acc<T>(1) : a.scale(), sum);
}

// One warp per window and slab: joins the pieces of the long row that begins in the window, if one does.
template <typename T, int n, bool weighted>
__global__ void __launch_bounds__(128) bag_join_kernel(const BagBackward<T> a) {
  using A = Acc<T>;
  const int64_t window = warp_row(), column = lane_column<n>();
  const int64_t start = window * kWindow;
  if (start >= a.count) return;
  const uint32_t v = a.keys[min(start + kWindow, int64_t(a.count)) - 1];
  if (v >= a.rows) return;
  const int begin = a.offsets[v], end = a.offsets[v + 1];
  if (end - begin <= kWindow || begin < start) return;
  // Of its first window it has the second piece, unless it fills the window.
  const auto piece = [&](int64_t w) { return Term<A>{2 * w + (w == window && begin > start), 1}; };
  A sum[kUnroll][n] = {};
  gather<A, n, 4 * kInFlight>(a.pieces, a.dim, column, window, (end - 1) / kWindow + 1, piece, sum);
  A scale = weighted ? A(1) : a.scale();
  put(a.out + v * a.dim, a.dim, column, scale, sum);
}

}  // namespace tst::cuda
