// bag_embedding on CUDA: out[..., :] = sum_i w_i weight[input_ids[..., i], :] / sum_i w_i, and its gradient.
#include "bag_embedding.h"

#include <cub/device/device_radix_sort.cuh>

#include "op.h"

namespace tst::cuda {

namespace {

constexpr int kThreads = 128;

struct Checked {
  Tensor ids;  // int64, contiguous
  std::optional<Tensor> position_weights;
  Pooling pooling;
  int64_t bags;
  bool weighted;
};

Checked checked(const Tensor& input_ids, const Tensor& beside, const std::string& mode,
                std::optional<int64_t> padding_idx, const std::optional<Tensor>& position_weights) {
  STD_TORCH_CHECK(mode == "mean" || mode == "sum", "mode: expected 'mean' or 'sum', got '", mode, "'");
  STD_TORCH_CHECK(input_ids.dim() >= 1 && input_ids.size(input_ids.dim() - 1) >= 1,
                  "input_ids: expected [..., bag_size] with bag_size >= 1");
  check_same_device("input_ids, weight", input_ids, beside);
  const int64_t bag_size = input_ids.size(input_ids.dim() - 1);
  STD_TORCH_CHECK(input_ids.numel() < int64_t(1) << 31, "input_ids: expected fewer than 2^31, got ", input_ids.numel());
  Checked out{as_int64("input_ids", input_ids), std::nullopt, {}, input_ids.numel() / bag_size, false};
  if (position_weights) {
    STD_TORCH_CHECK(position_weights->numel() == bag_size,
                    "position_weights: expected one weight per position of the bag");
    check_same_device("input_ids, position_weights", input_ids, *position_weights);
    out.position_weights = torch::stable::contiguous(torch::stable::to(*position_weights, ScalarType::Double));
  }
  out.weighted = padding_idx || position_weights;
  out.pooling.bag_size = static_cast<int>(bag_size);
  out.pooling.mean = mode == "mean";
  out.pooling.padded = padding_idx.has_value();
  out.pooling.padding_idx = padding_idx.value_or(0);
  out.pooling.position_weights = out.position_weights ? data<double>(*out.position_weights) : nullptr;
  return out;
}

void check_rows(int64_t rows) {  // the kernels have them as int
  STD_TORCH_CHECK(rows < int64_t(1) << 31, "weight: expected fewer than 2^31 rows, got ", rows);
}

// 16 bytes at a time where every row starts at a multiple of them.
template <typename T>
bool aligned(int64_t dim, const Tensor& a, const Tensor& b) {
  const auto address = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  return dim % kPack<T> == 0 && address(a) % 16 == 0 && address(b) % 16 == 0;
}

template <int n, int packs>
unsigned slabs(int64_t dim) {
  const unsigned count = blocks_for(dim, kSlab<n, packs>);
  STD_TORCH_CHECK(count <= 65535, "weight: rows too long for one CUDA grid: ", dim, " columns");
  return count;
}

// A warp for each of `work`, in each slab.
template <int n, int packs>
Extent warps(int64_t work, int64_t dim) {
  return {dim3(blocks_for(work, kThreads / kWarp), slabs<n, packs>(dim)), kThreads};
}

template <typename F>
void with_flag(bool flag, F f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f with the type, the elements moved at a time and whether ids are weighted, all as types.
template <typename F>
void with_variant(const Tensor& table, const Tensor& other, int64_t dim, bool weighted, F f) {
  with_type("weight", table, [&](auto type) {
    using T = decltype(type);
    with_flag(weighted, [&](auto is_weighted) {
      if (aligned<T>(dim, table, other))
        f(type, std::integral_constant<int, kPack<T>>{}, is_weighted);
      else
        f(type, std::integral_constant<int, 1>{}, is_weighted);
    });
  });
}

}  // namespace

Tensor bag_embedding(const Tensor& input_ids, const Tensor& weight, const std::string& mode,
                     std::optional<int64_t> padding_idx, const std::optional<Tensor>& position_weights) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [num_embeddings, embedding_dim]");
  const Checked c = checked(input_ids, weight, mode, padding_idx, position_weights);
  check_rows(weight.size(0));
  const Current current(weight);
  const Tensor table = torch::stable::contiguous(weight);
  const int64_t dim = weight.size(1);
  std::vector<int64_t> shape(input_ids.sizes().begin(), input_ids.sizes().end());
  shape.back() = dim;
  Tensor out = torch::stable::new_empty(weight, shape);
  if (out.numel() == 0) return out;
  with_variant(table, out, dim, c.weighted, [&](auto type, auto n, auto weighted) {
    using T = decltype(type);
    const BagForward<T> a{
        data<int64_t>(c.ids), data<T>(table), mutable_data<T>(out), c.bags, table.size(0), dim, c.pooling};
    current.launch(bag_embedding_kernel<T, n(), weighted()>, warps<n(), kForwardPacks>(c.bags, dim), a);
  });
  return out;
}

Tensor bag_embedding_backward(const Tensor& grad, const Tensor& input_ids, int64_t num_embeddings,
                              const std::string& mode, std::optional<int64_t> padding_idx,
                              const std::optional<Tensor>& position_weights) {
  const Checked c = checked(input_ids, grad, mode, padding_idx, position_weights);
  const Current current(grad);
  const Tensor rows = flatten_rows(grad);  // [bags, dim]
  STD_TORCH_CHECK(rows.size(0) == c.bags, "grad: expected one row per bag");
  check_rows(num_embeddings);
  const int64_t dim = rows.size(1), count = c.ids.numel();
  Tensor out = torch::stable::new_empty(grad, {num_embeddings, dim});
  if (out.numel() == 0) return out;
  if (count == 0) return torch::stable::zero_(out);

  const auto integers = [&](int64_t n) { return torch::stable::new_empty(grad, {n}, ScalarType::Int); };
  const Tensor keys = integers(count), places = integers(count), sorted_keys = integers(count),
               sorted_places = integers(count), offsets = integers(num_embeddings + 1);
  const int64_t windows = (count + kWindow - 1) / kWindow, piece_count = count > kWindow ? 2 * windows : 0;
  const Tensor longs = integers(1 + windows);  // a long row fills a window
  const Tensor scales = torch::stable::new_empty(grad, {c.weighted ? c.bags : 0}, ScalarType::Double);
  const BagHits hits{data<int64_t>(c.ids),
                     c.bags,
                     num_embeddings,
                     c.pooling,
                     mutable_data<uint32_t>(keys),
                     mutable_data<uint32_t>(places),
                     mutable_data<double>(scales),
                     mutable_data<int>(longs)};
  with_flag(c.weighted, [&](auto weighted) {
    current.launch(bag_hits_kernel<weighted()>, {blocks_for(c.bags, kThreads), kThreads}, hits);
  });

  int bits = 1;  // of a key, num_embeddings included
  while (num_embeddings >> bits) ++bits;
  size_t bytes = 0;
  const auto sort = [&](void* scratch) {
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
        scratch, bytes, data<uint32_t>(keys), mutable_data<uint32_t>(sorted_keys), data<uint32_t>(places),
        mutable_data<uint32_t>(sorted_places), static_cast<int>(count), 0, bits, current.stream));
  };
  sort(nullptr);
  const Tensor scratch =
      torch::stable::new_empty(grad, {std::max<int64_t>(1, static_cast<int64_t>(bytes))}, ScalarType::Byte);
  sort(scratch.mutable_data_ptr());
  current.launch(bag_offsets_kernel, {blocks_for(num_embeddings + 1, kThreads), kThreads}, data<uint32_t>(sorted_keys),
                 static_cast<int>(count), num_embeddings, mutable_data<int>(offsets), mutable_data<int>(longs));

  const Tensor pieces = torch::stable::new_empty(grad, {piece_count, dim}, accumulation_type(grad));
  with_variant(rows, out, dim, c.weighted, [&](auto type, auto n, auto weighted) {
    using T = decltype(type);
    const BagBackward<T> a{data<T>(rows),
                           data<uint32_t>(sorted_keys),
                           data<uint32_t>(sorted_places),
                           data<int>(offsets),
                           data<int>(longs),
                           data<double>(scales),
                           mutable_data<T>(out),
                           mutable_data<Acc<T>>(pieces),
                           piece_count,
                           num_embeddings,
                           dim,
                           static_cast<int>(count),
                           c.pooling};
    const int64_t groups = (num_embeddings + kRows - 1) / kRows;
    current.launch(bag_rows_kernel<T, n(), weighted()>, warps<n(), kBackwardPacks>(piece_count + groups, dim), a);
    if (piece_count == 0) return;
    Extent extent{dim3(1, slabs<n(), 1>(dim)), kJoinWarps * kWarp, 1, kJoinMemory<T, n()>};
    const auto join = bag_join_kernel<T, n(), weighted()>;
    extent.grid.x =
        static_cast<unsigned>(std::clamp<int64_t>(current.resident(join, extent) / extent.grid.y, 1, windows));
    current.launch(join, extent, a);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) {
  m.impl("bag_embedding", TORCH_BOX(&bag_embedding));
  m.impl("bag_embedding_backward", TORCH_BOX(&bag_embedding_backward));
}

}  // namespace tst::cuda
