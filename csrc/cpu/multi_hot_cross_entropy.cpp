// The loss of logits that exist already on CPU, and the pass over rows of logits that can overwrite them by their
// gradient.
#include "row_loss.h"

namespace tst::cpu {

std::tuple<Tensor, Tensor> multi_hot_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& label_scale, TST_LOSS_PARAMETERS,
                                                   const std::string& reduction) {
  const Tensor z = flatten_rows(logits);
  RowLoss loss(z.size(0), z.size(1), labels, label_scale, std::nullopt, std::nullopt, TST_LOSS_OPTIONS);
  loss.run(0, z, false);
  return loss.results(z, reduction);
}

void multi_hot_cross_entropy_rows_(Tensor logits, const Tensor& labels, const Tensor& label_scale, Tensor loss,
                                   Tensor lse, const std::optional<Tensor>& grad_loss,
                                   const std::optional<Tensor>& grad_lse, TST_LOSS_PARAMETERS, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits: expected [N, V] without gaps inside a row");
  for (const Tensor& out : {loss, lse}) {
    STD_TORCH_CHECK(out.dim() == 1 && out.size(0) == logits.size(0), "loss, lse: expected [N]");
  }
  RowLoss rows(logits.size(0), logits.size(1), labels, label_scale, grad_loss, grad_lse, TST_LOSS_OPTIONS);
  rows.run(0, logits, gradient);
  const auto [row_loss, row_lse] = rows.results(logits, "none");
  torch::stable::copy_(loss, row_loss);
  torch::stable::copy_(lse, row_lse);
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CPU, m) {
  m.impl("multi_hot_cross_entropy", TORCH_BOX(&multi_hot_cross_entropy));
  m.impl("multi_hot_cross_entropy_rows_", TORCH_BOX(&multi_hot_cross_entropy_rows_));
}

}  // namespace tst::cpu
