// multi_hot_cross_entropy on CPU: the loss of logits that exist already, and their gradient written over them.
// In two ops, or in one for a caller that works chunk by chunk.
#include "loss.h"

namespace tst::cpu {

std::tuple<Tensor, Tensor> multi_hot_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& position_scale, const std::string& objective,
                                                   int64_t ignore_index, const std::string& reduction,
                                                   std::optional<double> logit_softcap, double z_loss,
                                                   double label_smoothing) {
  const Tensor z = flatten_rows(logits);
  RowLoss loss(z.size(0), z.size(1), labels, position_scale, std::nullopt, std::nullopt, objective, ignore_index,
               logit_softcap, z_loss, label_smoothing);
  loss.run(0, z, false);
  return loss.results(z, reduction);
}

void multi_hot_cross_entropy_backward_(Tensor logits, const Tensor& labels, const Tensor& position_scale,
                                       const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
                                       const std::string& objective, int64_t ignore_index,
                                       std::optional<double> logit_softcap, double z_loss, double label_smoothing) {
  STD_TORCH_CHECK(logits.is_contiguous(), "logits: expected a contiguous tensor to overwrite");
  const Tensor z = flatten_rows(logits);
  RowLoss loss(z.size(0), z.size(1), labels, position_scale, grad_loss, grad_lse, objective, ignore_index,
               logit_softcap, z_loss, label_smoothing);
  loss.run(0, z, true);
}

void multi_hot_cross_entropy_rows_(Tensor logits, const Tensor& labels, const Tensor& position_scale, Tensor loss,
                                   Tensor lse, const std::optional<Tensor>& grad_loss,
                                   const std::optional<Tensor>& grad_lse, const std::string& objective,
                                   int64_t ignore_index, std::optional<double> logit_softcap, double z_loss,
                                   double label_smoothing, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits: expected [N, V] without gaps inside a row");
  RowLoss rows(logits.size(0), logits.size(1), labels, position_scale, grad_loss, grad_lse, objective, ignore_index,
               logit_softcap, z_loss, label_smoothing);
  rows.run(0, logits, gradient);
  const auto [row_loss, row_lse] = rows.results(logits, "none");
  torch::stable::copy_(loss, row_loss);
  torch::stable::copy_(lse, row_lse);
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CPU, m) {
  m.impl("multi_hot_cross_entropy", TORCH_BOX(&multi_hot_cross_entropy));
  m.impl("multi_hot_cross_entropy_backward_", TORCH_BOX(&multi_hot_cross_entropy_backward_));
  m.impl("multi_hot_cross_entropy_rows_", TORCH_BOX(&multi_hot_cross_entropy_rows_));
}

}  // namespace tst::cpu
