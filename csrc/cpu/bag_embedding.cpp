// bag_embedding on CPU: out[..., :] = scale * sum_i weight[input_ids[..., i], :], and its gradient.
#include <algorithm>
#include <vector>

#include "dtype.h"

namespace tst::cpu {
namespace {

double scale_of(const std::string& mode, int64_t bag_size) {
  STD_TORCH_CHECK(mode == "mean" || mode == "sum", "mode: expected 'mean' or 'sum', got '", mode, "'");
  return mode == "mean" ? 1.0 / static_cast<double>(bag_size) : 1.0;
}

Tensor checked_ids(const Tensor& input_ids, int64_t rows) {
  STD_TORCH_CHECK(input_ids.dim() >= 1 && input_ids.size(input_ids.dim() - 1) >= 1,
                  "input_ids: expected [..., bag_size] with bag_size >= 1");
  const Tensor ids = as_int64("input_ids", input_ids);
  const int64_t* data = ids.const_data_ptr<int64_t>();
  // 0 as the ignored value: it is either in range or everything is out of range.
  const int64_t bad = find_out_of_range(data, ids.numel(), rows, rows > 0 ? 0 : INT64_MIN);
  if (bad >= 0) throw_out_of_range("input_ids", ids, data, bad, rows);
  return ids;
}

// Rows per task of about 64 KiB of reads: above the cost of waking a thread, below a core's share of a small batch.
int64_t grain(int64_t elements_per_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_row)); }

}  // namespace

Tensor bag_embedding(const Tensor& input_ids, const Tensor& weight, const std::string& mode) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [num_embeddings, embedding_dim]");
  const Tensor ids = checked_ids(input_ids, weight.size(0));
  const Tensor table = torch::stable::contiguous(weight);
  const int64_t bag_size = ids.size(ids.dim() - 1), dim = weight.size(1), bags = ids.numel() / bag_size;

  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.back() = dim;
  Tensor out = torch::stable::new_empty(weight, shape);
  std::vector<int64_t> offsets(bags + 1);
  for (int64_t bag = 0; bag <= bags; ++bag) offsets[bag] = bag * bag_size;

  const GatherSum args{table.const_data_ptr(),
                       ids.const_data_ptr<int64_t>(),
                       offsets.data(),
                       offsets.data() + 1,
                       nullptr,
                       out.mutable_data_ptr(),
                       dim,
                       scale_of(mode, bag_size)};
  const GatherSumFn kernel = kernels().gather_sum[dtype_of("weight", weight)];
  torch::stable::parallel_for(0, bags, grain(bag_size * dim),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor bag_embedding_backward(const Tensor& grad, const Tensor& input_ids, int64_t num_embeddings,
                              const std::string& mode) {
  const Tensor ids = checked_ids(input_ids, num_embeddings);
  const Tensor rows = flatten_rows(grad);  // [bags, dim]
  const int64_t bag_size = ids.size(ids.dim() - 1), bags = ids.numel() / bag_size, dim = rows.size(1);
  STD_TORCH_CHECK(rows.size(0) == bags, "grad: expected one row per bag");
  const DType dtype = dtype_of("grad", grad);
  const double scale = scale_of(mode, bag_size);
  const BagsById plan = bags_by_id(ids.const_data_ptr<int64_t>(), bags, bag_size, num_embeddings);
  const Kernels& k = kernels();

  Tensor out = torch::stable::new_empty(grad, {num_embeddings, dim});
  // Every row is written here, those without hits as zeros: torch.zeros would touch the same pages a second time.
  const GatherSum all{rows.const_data_ptr(),
                      plan.bags.data(),
                      plan.offsets.data(),
                      plan.offsets.data() + 1,
                      nullptr,
                      out.mutable_data_ptr(),
                      dim,
                      scale};
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
                        1.0};
    torch::stable::parallel_for(0, pieces, 1,
                                [&](int64_t begin, int64_t end) { k.gather_sum_partial[dtype](cut, begin, end); });
    const GatherSum join{partial.const_data_ptr(),
                         nullptr,
                         plan.long_offsets.data(),
                         plan.long_offsets.data() + 1,
                         plan.long_rows.data(),
                         out.mutable_data_ptr(),
                         dim,
                         scale};
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
