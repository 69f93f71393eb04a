// The loss of logits that exist already on CUDA, and the pass over rows of logits that can overwrite them by their
// gradient.
#include <tuple>

#include "op.h"
#include "shape.h"

namespace tst::cuda {
namespace {

// Clusters need code compiled for sm_90: all kernels of this file are compiled for the same architectures.
DeviceFacts device_facts() {
  cudaFuncAttributes compiled{};
  STD_CUDA_CHECK(
      cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(loss_rows_kernel<float, true, Pass::kLoss>)));
  return {compiled.ptxVersion >= 90 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9,
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

template <typename T, bool plain>
auto kernel_of(Pass pass) {
  switch (pass) {
    case Pass::kLoss:
      return loss_rows_kernel<T, plain, Pass::kLoss>;
    case Pass::kGradient:
      return loss_rows_kernel<T, plain, Pass::kGradient>;
    default:
      return loss_rows_kernel<T, plain, Pass::kCachedGradient>;
  }
}

// logits [N, V] with any row stride, loss and lse [N] contiguous; with `gradient` overwritten by it.
void loss_rows(const Tensor& logits, const Tensor& labels, const Tensor& label_scale, const Tensor& loss,
               const Tensor& lse, const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
               const LossOptions& options, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits: expected [N, V] with adjacent columns");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(vocabulary < int64_t(1) << 30, "logits: expected fewer than 2^30 columns, got ", vocabulary);
  check_same_device("logits, labels", logits, labels);
  check_same_device("logits, label_scale", logits, label_scale);
  const ScalarType wide = accumulation_type(logits);
  const auto numbers = [&](const char* name, const Tensor& tensor) {
    check_same_device(name, logits, tensor);
    return torch::stable::contiguous(torch::stable::to(tensor, wide));
  };
  const Tensor bags = as_int64("labels", labels), scale = numbers("label_scale", label_scale);
  const int64_t dims = scale.dim(), bag_size = dims == 1 || dims == 2 ? scale.size(dims - 1) : 0;
  STD_TORCH_CHECK(bag_size >= 1 && bags.numel() == rows * bag_size && (dims == 1 || scale.size(0) == rows),
                  "labels, label_scale: expected [..., s] for each row, and [s] or [rows, s]");
  std::optional<Tensor> g, u;
  if (grad_loss) g = numbers("grad_loss", *grad_loss);
  if (grad_lse) u = numbers("grad_lse", *grad_lse);
  STD_TORCH_CHECK(!g || g->dim() == 0 || (g->dim() == 1 && g->numel() == rows),
                  "grad_loss: expected a scalar or one a row");
  STD_TORCH_CHECK(!u || (u->dim() == 1 && u->numel() == rows), "grad_lse: expected one number a row");
  for (const Tensor& out : {loss, lse}) {
    check_same_device("loss, lse", logits, out);
    STD_TORCH_CHECK(out.scalar_type() == wide && out.dim() == 1 && out.numel() == rows && out.is_contiguous(),
                    "loss, lse: expected [N], contiguous, float32 (float64 for float64)");
  }
  if (rows == 0) return;

  const Current current(logits);
  with_type("logits", logits, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    LossRows<T> a{};
    a.logits = gradient ? mutable_data<T>(logits) : const_cast<T*>(data<T>(logits));
    a.rows = rows;
    a.stride = logits.stride(0);
    a.vocabulary = static_cast<int>(vocabulary);
    a.labels = data<int64_t>(bags);
    a.bag_size = static_cast<int>(bag_size);
    a.label_scale = data<A>(scale);
    a.scale_stride = dims == 2 ? bag_size : 0;
    a.options = options;
    a.grad_loss = g ? data<A>(*g) : nullptr;
    a.grad_loss_stride = g && g->dim() == 1;
    a.grad_lse = u ? data<A>(*u) : nullptr;
    a.loss = mutable_data<A>(loss);
    a.lse = mutable_data<A>(lse);
    const Shape shape = shape_of<T>(vocabulary, bag_size, gradient, device_facts());
    a.cache_bytes = shape.cache_bytes;
    const auto kernel = options.plain() ? kernel_of<T, true>(shape.pass) : kernel_of<T, false>(shape.pass);
    Extent extent{dim3(static_cast<unsigned>(shape.blocks)), static_cast<unsigned>(shape.threads),
                  static_cast<unsigned>(shape.blocks), static_cast<size_t>(shape.shared_bytes)};
    extent.grid.x *= static_cast<unsigned>(std::min(rows, current.resident(kernel, extent)));
    current.launch(kernel, extent, a);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> multi_hot_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& label_scale, TST_LOSS_PARAMETERS,
                                                   const std::string& reduction) {
  STD_TORCH_CHECK(reduction == "none" || reduction == "sum", "reduction: expected 'none' or 'sum', got '", reduction,
                  "'");
  const Tensor z = flatten_rows(logits);
  const auto row_values = [&] { return torch::stable::new_empty(z, {z.size(0)}, accumulation_type(z)); };
  const Tensor loss = row_values(), lse = row_values();
  loss_rows(z, labels, label_scale, loss, lse, std::nullopt, std::nullopt, TST_LOSS_OPTIONS, false);
  return {reduction == "none" ? loss : torch::stable::sum(loss), lse};
}

void multi_hot_cross_entropy_rows_(Tensor logits, const Tensor& labels, const Tensor& label_scale, Tensor loss,
                                   Tensor lse, const std::optional<Tensor>& grad_loss,
                                   const std::optional<Tensor>& grad_lse, TST_LOSS_PARAMETERS, bool gradient) {
  loss_rows(logits, labels, label_scale, loss, lse, grad_loss, grad_lse, TST_LOSS_OPTIONS, gradient);
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) {
  m.impl("multi_hot_cross_entropy", TORCH_BOX(&multi_hot_cross_entropy));
  m.impl("multi_hot_cross_entropy_rows_", TORCH_BOX(&multi_hot_cross_entropy_rows_));
}

}  // namespace tst::cuda
