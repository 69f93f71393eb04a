// The loss of logits on CUDA: multi_hot_cross_entropy, its backward, and the row pass of
// linear_multi_hot_cross_entropy.
#include <tuple>

#include "loss_rows.h"
#include "op.h"

namespace tst::cuda {
namespace {

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// How a row is cut: into as few slices as leave room for several blocks of 40 KiB on a multiprocessor. Clusters of up
// to 8 blocks are portable; they need sm_90, and code compiled for it.
struct Shape {
  int blocks, threads, cache_bytes, shared_bytes;
};

template <typename T>
Shape shape_of(const void* kernel, const LossRows<T>& a, bool gradient) {
  cudaFuncAttributes facts{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&facts, kernel));
  const bool clusters = facts.ptxVersion >= 90 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  constexpr int64_t kComfortable = 40 << 10;
  int64_t blocks = 1;
  while (clusters && blocks < 8 && slice_bytes<T>(a.vocabulary, blocks) > kComfortable) blocks *= 2;
  const int64_t fixed = loss_rows_memory<T>(a.bag_size), slice = slice_bytes<T>(a.vocabulary, blocks);
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  STD_TORCH_CHECK(fixed <= most, "labels: bags of at most ", (most - loss_rows_memory<T>(0)) / sizeof(Target),
                  " labels on this device, got ", a.bag_size);
  // Without clusters a long row would leave room for one block: it is read a second time, mostly out of the cache.
  const bool cached = gradient && fixed + slice <= (clusters ? most : 2 * kComfortable);
  const int64_t packs = slice / 16;
  const int threads = packs > 4096 ? kMaxThreads : packs > 256 ? 256 : 64;
  const int64_t cache = cached ? slice : 0;
  return {static_cast<int>(blocks), threads, static_cast<int>(cache), static_cast<int>(fixed + cache)};
}

template <typename T, bool plain, bool gradient>
void launch_as(LossRows<T> a, int64_t rows, cudaStream_t stream) {
  const auto kernel = loss_rows_kernel<T, plain, gradient>;
  const Shape shape = shape_of(reinterpret_cast<const void*>(kernel), a, gradient);
  a.cache_bytes = shape.cache_bytes;
  if (shape.shared_bytes > 48 << 10) {  // what a kernel may have without asking; all there is, so that no thread takes
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);  // back what another asked for
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(rows * shape.blocks, 1));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.blocks > 1 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a));
}

struct Options {
  const std::string& objective;
  int64_t ignore_index;
  std::optional<double> logit_softcap;
  double z_loss, label_smoothing;
};

// logits [N, V] with any row stride, loss and lse [N] contiguous; with `gradient` overwritten by it.
void loss_rows(const Tensor& logits, const Tensor& labels, const Tensor& position_scale, const Tensor& loss,
               const Tensor& lse, const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
               const Options& options, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits: expected [N, V] with adjacent columns");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  STD_TORCH_CHECK(vocabulary < int64_t(1) << 30, "logits: expected fewer than 2^30 columns, got ", vocabulary);
  check_same_device("logits, labels", logits, labels);
  check_same_device("logits, position_scale", logits, position_scale);
  STD_TORCH_CHECK(options.objective == "mce" || options.objective == "mce_alt",
                  "objective: expected 'mce' or 'mce_alt', got '", options.objective, "'");
  STD_TORCH_CHECK(!options.logit_softcap || (*options.logit_softcap > 0 && *options.logit_softcap < HUGE_VAL),
                  "logit_softcap: expected a finite number > 0");
  STD_TORCH_CHECK(options.z_loss >= 0 && options.z_loss < HUGE_VAL, "z_loss: expected a finite number >= 0");
  STD_TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing: expected 0 to 1");
  const ScalarType wide = accumulation_type(logits);
  const auto numbers = [&](const char* name, const Tensor& tensor) {
    check_same_device(name, logits, tensor);
    return torch::stable::contiguous(torch::stable::to(tensor, wide));
  };
  const Tensor bags = as_int64("labels", labels), scale = numbers("position_scale", position_scale);
  const int64_t bag_size = scale.numel();
  STD_TORCH_CHECK(scale.dim() == 1 && bag_size >= 1 && bags.numel() == rows * bag_size,
                  "labels, position_scale: expected [..., s] for each row, and [s]");
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
    a.stride = logits.stride(0);
    a.vocabulary = static_cast<int>(vocabulary);
    a.labels = data<int64_t>(bags);
    a.bag_size = static_cast<int>(bag_size);
    a.ignore_index = options.ignore_index;
    a.position_scale = data<A>(scale);
    a.objective = options.objective == "mce" ? Objective::kMce : Objective::kMceAlt;
    a.logit_softcap = options.logit_softcap.value_or(0.0);
    a.z_loss = options.z_loss;
    a.label_smoothing = options.label_smoothing;
    a.grad_loss = g ? data<A>(*g) : nullptr;
    a.grad_loss_stride = g && g->dim() == 1;
    a.grad_lse = u ? data<A>(*u) : nullptr;
    a.loss = mutable_data<A>(loss);
    a.lse = mutable_data<A>(lse);
    const bool plain = a.logit_softcap == 0 && a.label_smoothing == 0;
    if (plain && gradient) return launch_as<T, true, true>(a, rows, current.stream);
    if (plain) return launch_as<T, true, false>(a, rows, current.stream);
    if (gradient) return launch_as<T, false, true>(a, rows, current.stream);
    launch_as<T, false, false>(a, rows, current.stream);
  });
}

Tensor new_rows(const Tensor& logits, int64_t rows) {
  return torch::stable::new_empty(logits, {rows}, accumulation_type(logits));
}

}  // namespace

std::tuple<Tensor, Tensor> multi_hot_cross_entropy(const Tensor& logits, const Tensor& labels,
                                                   const Tensor& position_scale, const std::string& objective,
                                                   int64_t ignore_index, const std::string& reduction,
                                                   std::optional<double> logit_softcap, double z_loss,
                                                   double label_smoothing) {
  STD_TORCH_CHECK(reduction == "none" || reduction == "sum", "reduction: expected 'none' or 'sum', got '", reduction,
                  "'");
  const Tensor z = flatten_rows(logits);
  const Tensor loss = new_rows(z, z.size(0)), lse = new_rows(z, z.size(0));
  loss_rows(z, labels, position_scale, loss, lse, std::nullopt, std::nullopt,
            {objective, ignore_index, logit_softcap, z_loss, label_smoothing}, false);
  return {reduction == "none" ? loss : torch::stable::sum(loss), lse};
}

void multi_hot_cross_entropy_backward_(Tensor logits, const Tensor& labels, const Tensor& position_scale,
                                       const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
                                       const std::string& objective, int64_t ignore_index,
                                       std::optional<double> logit_softcap, double z_loss, double label_smoothing) {
  STD_TORCH_CHECK(logits.is_contiguous(), "logits: expected a contiguous tensor to overwrite");
  const Tensor z = flatten_rows(logits);
  loss_rows(z, labels, position_scale, new_rows(z, z.size(0)), new_rows(z, z.size(0)), grad_loss, grad_lse,
            {objective, ignore_index, logit_softcap, z_loss, label_smoothing}, true);
}

void multi_hot_cross_entropy_rows_(Tensor logits, const Tensor& labels, const Tensor& position_scale, Tensor loss,
                                   Tensor lse, const std::optional<Tensor>& grad_loss,
                                   const std::optional<Tensor>& grad_lse, const std::string& objective,
                                   int64_t ignore_index, std::optional<double> logit_softcap, double z_loss,
                                   double label_smoothing, bool gradient) {
  loss_rows(logits, labels, position_scale, loss, lse, grad_loss, grad_lse,
            {objective, ignore_index, logit_softcap, z_loss, label_smoothing}, gradient);
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) {
  m.impl("multi_hot_cross_entropy", TORCH_BOX(&multi_hot_cross_entropy));
  m.impl("multi_hot_cross_entropy_backward_", TORCH_BOX(&multi_hot_cross_entropy_backward_));
  m.impl("multi_hot_cross_entropy_rows_", TORCH_BOX(&multi_hot_cross_entropy_rows_));
}

}  // namespace tst::cuda
