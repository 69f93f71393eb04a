// bag_embedding on CPU: out[..., :] = scale * sum_i weight[input_ids[..., i], :], and its gradient.
#include <algorithm>
#include <optional>
#include <vector>

#include "dtype.h"
#include "memory.h"

namespace tst::cpu {
namespace {

// Mean or sum over a bag as one factor, or, with ignored ids or position weights, as a coefficient for every id.
struct Pooling {
  double scale;
  std::vector<double> coefficients;  // [ids], 0 for ignored ones, or empty
};

Pooling pooling(const std::string& mode, const Tensor& ids, std::optional<int64_t> padding_idx,
                const std::optional<Tensor>& position_weights) {
  STD_TORCH_CHECK(mode == "mean" || mode == "sum", "mode: expected 'mean' or 'sum', got '", mode, "'");
  const int64_t bag_size = ids.size(ids.dim() - 1), count = ids.numel();
  const int64_t* data = ids.const_data_ptr<int64_t>();
  const bool padded = padding_idx && std::find(data, data + count, *padding_idx) != data + count;
  if (!padded && !position_weights) return {mode == "mean" ? 1.0 / static_cast<double>(bag_size) : 1.0, {}};

  std::vector<double> weights(bag_size, 1.0);
  if (position_weights) {
    const Tensor given = torch::stable::contiguous(torch::stable::to(*position_weights, ScalarType::Double));
    STD_TORCH_CHECK(given.numel() == bag_size, "position_weights: expected one weight per position of the bag");
    std::copy_n(given.const_data_ptr<double>(), bag_size, weights.begin());
  }
  Pooling result{1.0, std::vector<double>(count)};
  for (int64_t bag = 0; bag < count; bag += bag_size) {
    const auto weight = [&](int64_t i) { return padded && data[bag + i] == *padding_idx ? 0.0 : weights[i]; };
    double total = 0;
    for (int64_t i = 0; i < bag_size; ++i) total += weight(i);
    const double divisor = mode == "sum" || total == 0 ? 1.0 : total;
    for (int64_t i = 0; i < bag_size; ++i) result.coefficients[bag + i] = weight(i) / divisor;
  }
  return result;
}

Tensor checked_ids(const Tensor& input_ids, int64_t rows, std::optional<int64_t> padding_idx) {
  STD_TORCH_CHECK(input_ids.dim() >= 1 && input_ids.size(input_ids.dim() - 1) >= 1,
                  "input_ids: expected [..., bag_size] with bag_size >= 1");
  const Tensor ids = as_int64("input_ids", input_ids);
  const int64_t* data = ids.const_data_ptr<int64_t>();
  const int64_t bad = find_out_of_range(data, ids.numel(), rows, padding_idx);
  if (bad >= 0) throw_out_of_range("input_ids", ids, data, bad, rows);
  return ids;
}

// Rows per task of about 64 KiB of reads: above the cost of waking a thread, below a core's share of a small batch.
int64_t grain(int64_t elements_per_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_row)); }

}  // namespace

Tensor bag_embedding(const Tensor& input_ids, const Tensor& weight, const std::string& mode,
                     std::optional<int64_t> padding_idx, const std::optional<Tensor>& position_weights) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [num_embeddings, embedding_dim]");
  const Tensor ids = checked_ids(input_ids, weight.size(0), padding_idx);
  const Tensor table = torch::stable::contiguous(weight);
  const int64_t bag_size = ids.size(ids.dim() - 1), dim = weight.size(1), bags = ids.numel() / bag_size;
  const Pooling pool = pooling(mode, ids, padding_idx, position_weights);
  const int64_t* index = ids.const_data_ptr<int64_t>();

  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.back() = dim;
  Tensor out = torch::stable::new_empty(weight, shape);
  std::vector<int64_t> offsets(bags + 1), kept;
  std::vector<double> coefficients = pool.coefficients;
  for (int64_t bag = 0; bag <= bags; ++bag) offsets[bag] = bag * bag_size;
  if (!coefficients.empty()) {  // rows that count 0 are not read: 0 times their infinity would be NaN
    coefficients.clear();
    for (int64_t bag = 0; bag < bags; ++bag) {
      offsets[bag] = static_cast<int64_t>(kept.size());
      for (int64_t p = bag * bag_size; p < (bag + 1) * bag_size; ++p) {
        if (pool.coefficients[p] == 0) continue;
        kept.push_back(index[p]);
        coefficients.push_back(pool.coefficients[p]);
      }
    }
    offsets[bags] = static_cast<int64_t>(kept.size());
    kept.push_back(0);  // so that data() of an empty one is no null pointer
    coefficients.push_back(0);
    index = kept.data();
  }

  const GatherSum args{table.const_data_ptr(),
                       index,
                       offsets.data(),
                       offsets.data() + 1,
                       nullptr,
                       out.mutable_data_ptr(),
                       dim,
                       pool.scale,
                       coefficients.empty() ? nullptr : coefficients.data()};
  const GatherSumFn kernel = kernels().gather_sum[dtype_of("weight", weight)];
  torch::stable::parallel_for(0, bags, grain(bag_size * dim),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor bag_embedding_backward(const Tensor& grad, const Tensor& input_ids, int64_t num_embeddings,
                              const std::string& mode, std::optional<int64_t> padding_idx,
                              const std::optional<Tensor>& position_weights) {
  const Tensor ids = checked_ids(input_ids, num_embeddings, padding_idx);
  const Tensor rows = flatten_rows(grad);  // [bags, dim]
  const int64_t bag_size = ids.size(ids.dim() - 1), bags = ids.numel() / bag_size, dim = rows.size(1);
  STD_TORCH_CHECK(rows.size(0) == bags, "grad: expected one row per bag");
  const DType dtype = dtype_of("grad", grad);
  const Pooling pool = pooling(mode, ids, padding_idx, position_weights);
  const double scale = pool.scale;
  const BagsById plan = bags_by_id(ids.const_data_ptr<int64_t>(), bags, bag_size, num_embeddings, padding_idx,
                                   pool.coefficients.empty() ? nullptr : pool.coefficients.data());
  const double* coefficients = plan.coefficients.empty() ? nullptr : plan.coefficients.data();
  const Kernels& k = kernels();

  Tensor out = with_huge_pages(torch::stable::new_empty(grad, {num_embeddings, dim}));
  // Every row is written here, those without hits as zeros: torch.zeros would touch the same pages a second time.
  const GatherSum all{rows.const_data_ptr(),
                      plan.bags.data(),
                      plan.offsets.data(),
                      plan.offsets.data() + 1,
                      nullptr,
                      out.mutable_data_ptr(),
                      dim,
                      scale,
                      coefficients};
  const int64_t parts = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    k.gather_sum[dtype](all, balanced_start(plan.offsets, begin, parts), balanced_start(plan.offsets, end, parts));
  });

  if (!plan.long_rows.empty()) {
    const int64_t pieces = static_cast<int64_t>(plan.piece_offsets.size()) - 1;
    const int64_t long_rows = static_cast<int64_t>(plan.long_rows.size());
    Tensor partial = torch::stable::new_empty(grad, {pieces, dim}, accumulation_type(dtype));
    const GatherSum cut{rows.const_data_ptr(),
                        plan.bags.data(),
                        plan.piece_offsets.data(),
                        plan.piece_offsets.data() + 1,
                        nullptr,
                        partial.mutable_data_ptr(),
                        dim,
                        1.0,
                        coefficients};
    torch::stable::parallel_for(0, pieces, 1,
                                [&](int64_t begin, int64_t end) { k.gather_sum_partial[dtype](cut, begin, end); });
    const GatherSum join{partial.const_data_ptr(),
                         nullptr,
                         plan.long_offsets.data(),
                         plan.long_offsets.data() + 1,
                         plan.long_rows.data(),
                         out.mutable_data_ptr(),
                         dim,
                         scale,
                         nullptr};
    torch::stable::parallel_for(0, long_rows, 1,
                                [&](int64_t begin, int64_t end) { k.gather_sum_finish[dtype](join, begin, end); });
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CPU, m) {
  m.impl("bag_embedding", TORCH_BOX(&bag_embedding));
  m.impl("bag_embedding_backward", TORCH_BOX(&bag_embedding_backward));
}

}  // namespace tst::cpu
