// The second design of the loss, as an experiment: the GEMM of the logits writes E = exp(z - a), a the largest logit of
// the row's labels, and the sums of its rows. There is no row pass. See scaled_exp.py.
#include <cuda_bf16.h>

#include <cstdint>

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/kernel_hardware_info.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace scaled_exp {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
using Element = cutlass::bfloat16_t;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// ---- the GEMM ---------------------------------------------------------------------------------------------------

// exp(z - a) of k = log2(e) a.
template <class T>
struct Exponential;
template <int n>
struct Exponential<cutlass::Array<float, n>> {
  using Numbers = cutlass::Array<float, n>;
  CUTLASS_DEVICE Numbers operator()(const Numbers& z, const Numbers& k) const {
    Numbers out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < n; ++i) asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out[i]) : "f"(fmaf(z[i], kLog2E, -k[i])));
    return out;
  }
};
template <>
struct Exponential<float> {};  // named, never called

// CUTLASS's sum over the columns of a tile. It tests every column for the end of the matrix; here only a last tile
// does.
template <class Base>
struct SumOfColumns : Base {
  bool whole;
  CUTLASS_DEVICE explicit SumOfColumns(Base&& base) : Base(cute::move(base)) {
    whole = get<1>(get<12>(this->args_tuple)) >= int(size<1>(get<4>(this->args_tuple)));
  }
  template <class Accumulator, int n>
  CUTLASS_DEVICE cutlass::Array<float, n> visit(const cutlass::Array<Accumulator, n>&, int v, int tile_m, int tile_n,
                                                const cutlass::Array<float, n>& in) {
    Tensor sum = get<1>(this->args_tuple)(_, _, _, tile_m, tile_n);
    Tensor place = get<2>(this->args_tuple)(_, _, _, tile_m, tile_n);
    if (whole) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < n; ++i) sum(v * n + i) += in[i];
    } else {
      const auto end = get<13>(this->args_tuple);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < n; ++i) {
        const bool inside = get<1>(place(v * n + i)) < get<1>(end);
        sum(v * n + i) += inside ? in[i] : 0.f;
      }
    }
    return in;
  }
};

template <class Tile>
using Sums = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRound,
                                      Stride<_1, _0, _0>, 4, /*EnableNullptr=*/false, /*FinalReduction=*/false>;

// One sum per row and tile, added up later in a fixed order.
template <class Tile>
struct RowSums : Sums<Tile> {
  using Base = Sums<Tile>;
  CUTLASS_HOST_DEVICE RowSums() {}
  CUTLASS_HOST_DEVICE RowSums(const typename Base::Params& params, const typename Base::SharedStorage& storage)
      : Base(params, storage) {}
  template <bool source, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto base = Base::template get_consumer_store_callbacks<source>(args);
    return SumOfColumns<decltype(base)>(cute::move(base));
  }
};

using Tile = Shape<_128, _256, _64>;  // of rows, columns and d
using Cluster = Shape<_2, _1, _1>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, void, cutlass::layout::RowMajor, 8, Element, cutlass::layout::RowMajor, 8,
    cutlass::epilogue::TmaWarpSpecializedCooperative,
    fusion::Sm90EVT<RowSums<Tile>,
                    fusion::Sm90EVT<fusion::Sm90Compute<Exponential, float, float, kRound>, fusion::Sm90AccFetch,
                                    fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>, 4, false>>>>::
    CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8, Element,
    cutlass::layout::ColumnMajor, 8, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
    Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>>;

// ---- the rest of a row ------------------------------------------------------------------------------------------

__device__ float dot8(uint4 a, uint4 b, float sum) {
  unsigned const x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(x[i] << 16), __uint_as_float(y[i] << 16), sum);
    sum = fmaf(__uint_as_float(x[i] & 0xffff0000u), __uint_as_float(y[i] & 0xffff0000u), sum);
  }
  return sum;
}

// A block a row, a warp a label: z[n, i] = h_n . W_y; a_n = max_i z[n, i]; k_n = log2e a_n.
__global__ void label_logits(uint4 const* h, uint4 const* w, int64_t const* labels, int d8, int s, float* z, float* a,
                             float* k) {
  extern __shared__ uint4 row[];
  float* found = reinterpret_cast<float*>(row + d8);
  int64_t n = blockIdx.x;
  for (int i = threadIdx.x; i < d8; i += blockDim.x) row[i] = h[n * d8 + i];
  __syncthreads();
  int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < s; j += blockDim.x / 32) {
    uint4 const* weight = w + labels[n * s + j] * d8;
    float even = 0, odd = 0;
    int i = lane;
    for (; i + 32 < d8; i += 64) {
      uint4 first = weight[i], second = weight[i + 32];
      even = dot8(first, row[i], even);
      odd = dot8(second, row[i + 32], odd);
    }
    if (i < d8) even = dot8(weight[i], row[i], even);
    float sum = even + odd;
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) {
      found[j] = sum;
      z[n * s + j] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float most = found[0];
    for (int j = 1; j < s; ++j) most = fmaxf(most, found[j]);
    a[n] = most;
    k[n] = kLog2E * most;
  }
}

// 32 rows a block of 32 x 16 threads: T_n, lse_n, v_n and the row's loss.
__global__ void row_sums(float const* partials, int64_t pitch, int tiles, int N, int s, float const* a, float const* z,
                         float const* scale, float* T, float* lse, float* v, float* loss) {
  __shared__ float part[16][33];
  int n = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (n < N)
    for (int t = threadIdx.y; t < tiles; t += 16) sum += partials[t * pitch + n];
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || n >= N) return;
  for (int t = 1; t < 16; ++t) sum += part[t][threadIdx.x];
  float total = a[n] + logf(sum), S = 0, pull = 0;
  for (int i = 0; i < s; ++i) {
    S += scale[i];
    pull = fmaf(scale[i], total - z[int64_t(n) * s + i], pull);
  }
  T[n] = sum;
  lse[n] = total;
  v[n] = S / sum;
  loss[n] = pull;
}

__device__ unsigned scaled2(unsigned x, float v) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(__uint_as_float(x << 16) * v, __uint_as_float(x & 0xffff0000u) * v);
  return reinterpret_cast<unsigned&>(pair);
}

// A block a row: the label columns of E, and vh = v h.
__global__ void label_columns(__nv_bfloat16* E, int64_t lde, int64_t const* labels, float const* z, float const* a,
                              float const* v, float const* scale, int s, uint4 const* h, uint4* vh, int d8) {
  int64_t n = blockIdx.x;
  float factor = v[n];
  for (int j = threadIdx.x; j < s; j += blockDim.x) {
    int64_t y = labels[n * s + j];
    float p = 0;
    bool first = true;
    for (int i = 0; i < s; ++i)
      if (labels[n * s + i] == y) {
        first = first && i >= j;
        p += scale[i];
      }
    if (first) E[n * lde + y] = __float2bfloat16_rn(exp2f(kLog2E * (z[n * s + j] - a[n])) - p / factor);
  }
  for (int i = threadIdx.x; i < d8; i += blockDim.x) {
    uint4 x = h[n * d8 + i];
    vh[n * d8 + i] = {scaled2(x.x, factor), scaled2(x.y, factor), scaled2(x.z, factor), scaled2(x.w, factor)};
  }
}

// dh = v dh32; a block a row.
__global__ void scale_rows(float4 const* in, float const* v, uint4* out, int d8) {
  int64_t n = blockIdx.x;
  float f = v[n];
  for (int i = threadIdx.x; i < d8; i += blockDim.x) {
    float4 x = in[(n * d8 + i) * 2], y = in[(n * d8 + i) * 2 + 1];
    __nv_bfloat162 p[4] = {__floats2bfloat162_rn(x.x * f, x.y * f), __floats2bfloat162_rn(x.z * f, x.w * f),
                           __floats2bfloat162_rn(y.x * f, y.y * f), __floats2bfloat162_rn(y.z * f, y.w * f)};
    out[n * d8 + i] = reinterpret_cast<uint4&>(p);
  }
}

}  // namespace scaled_exp

// ---- for ctypes: 0, or an error ---------------------------------------------------------------------------------

using namespace scaled_exp;

extern "C" {

int64_t sums_pitch(int64_t rows) { return (rows + 127) / 128 * 128; }
int64_t sums_tiles(int64_t vocabulary) { return (vocabulary + 255) / 256; }
int64_t row_of(int64_t vocabulary) { return (vocabulary + 63) / 64 * 64; }

int label_logits_of(const void* h, const void* w, const int64_t* labels, int rows, int d, int s, float* z, float* a,
                    float* k, cudaStream_t stream) {
  const int warps = s < 8 ? s : 8;
  label_logits<<<rows, 32 * warps, d * 2 + s * 4, stream>>>(static_cast<const uint4*>(h), static_cast<const uint4*>(w),
                                                            labels, d / 8, s, z, a, k);
  return cudaGetLastError();
}

// e [rows, row_of(vocabulary)]; sums [sums_tiles, sums_pitch].
int exponentials(const void* h, const void* w, const float* k, void* e, float* sums, int rows, int vocabulary, int d,
                 cudaStream_t stream) {
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {rows, vocabulary, d, 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(h), arguments.mainloop.dA = {int64_t(d), _1{}, int64_t(0)};
  arguments.mainloop.ptr_B = static_cast<const Element*>(w), arguments.mainloop.dB = {int64_t(d), _1{}, int64_t(0)};
  arguments.epilogue.ptr_D = static_cast<Element*>(e), arguments.epilogue.dD = {row_of(vocabulary), _1{}, int64_t(0)};
  arguments.epilogue.dC = arguments.epilogue.dD;
  arguments.epilogue.thread = {{{}, {k, 0.f, {}}, {}}, {sums, 0.f, {}}};
  // Other orders of tiles take up to 1.2 times as long, 0.97 at best.
  arguments.scheduler.raster_order = decltype(arguments.scheduler.raster_order)::AlongN;
  arguments.scheduler.max_swizzle_size = 8;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
  if (Gemm::get_workspace_size(arguments) > 0) return -1;
  Gemm gemm;
  if (const auto status = gemm.initialize(arguments, nullptr, stream); status != cutlass::Status::kSuccess)
    return 1000 + static_cast<int>(status);
  return static_cast<int>(gemm.run(stream));
}

int finish(const float* sums, const int64_t* labels, const float* z, const float* a, const float* scale, int rows,
           int vocabulary, int d, int s, void* e, const void* h, float* total, float* lse, float* v, float* loss,
           void* vh, cudaStream_t stream) {
  row_sums<<<(rows + 31) / 32, dim3(32, 16), 0, stream>>>(
      sums, sums_pitch(rows), static_cast<int>(sums_tiles(vocabulary)), rows, s, a, z, scale, total, lse, v, loss);
  label_columns<<<rows, 128, 0, stream>>>(static_cast<__nv_bfloat16*>(e), row_of(vocabulary), labels, z, a, v, scale, s,
                                          static_cast<const uint4*>(h), static_cast<uint4*>(vh), d / 8);
  return cudaGetLastError();
}

int scaled_rows(const void* in, const float* v, void* out, int rows, int d, cudaStream_t stream) {
  scale_rows<<<rows, d / 8 < 128 ? 64 : 128, 0, stream>>>(static_cast<const float4*>(in), v, static_cast<uint4*>(out),
                                                          d / 8);
  return cudaGetLastError();
}

}  // extern "C"
