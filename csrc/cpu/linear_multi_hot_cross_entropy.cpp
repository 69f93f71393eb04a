// linear_multi_hot_cross_entropy on CPU: per chunk of rows one GEMM for the logits, one pass of ours that turns them
// into their gradient, two GEMMs. The full logits [N, V] never exist.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace tst::cpu {
namespace {

// out = beta * out + a @ b by ATen. torch_call_dispatcher cannot pass the Scalars of aten::addmm, so this is
// the C shim of the same CPU kernel.
void addmm(const Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

void accumulate(const Tensor& out, const Tensor& source, bool add) {
  const Accumulate args{source.const_data_ptr(), static_cast<float*>(out.mutable_data_ptr()), add};
  const AccumulateFn kernel = kernels().accumulate_bfloat16;
  torch::stable::parallel_for(0, source.numel(), 16384, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Rows per chunk. Memory: at most an eighth of the full logits, or 64 MiB where that is more. Speed: the weight is
// read again for every chunk, which from 256 to 512 rows saves another 4 % of the GEMMs (V = 128256, d = 1024).
int64_t default_chunk_size(int64_t rows, int64_t vocabulary, int64_t element_size) {
  const int64_t floor = (int64_t(64) << 20) / std::max<int64_t>(1, vocabulary * element_size);
  const int64_t limit = std::max<int64_t>({1, floor, std::min<int64_t>(rows / 8, 512)});
  const int64_t chunks = (rows + limit - 1) / limit;
  return chunks ? (rows + chunks - 1) / chunks : 1;
}

// Weight of position i's cross-entropies in the loss. "mean": the paper's, the mean over each position's valid rows,
// then the weighted mean over the positions that have any. "sum": each row's weighted mean over all positions, summed.
std::vector<double> position_scale(const int64_t* labels, int64_t rows, int64_t bag_size, int64_t ignore_index,
                                   const std::optional<Tensor>& position_weights, const std::string& reduction) {
  std::vector<double> weights(bag_size, 1.0);
  if (position_weights) {
    const Tensor given = torch::stable::contiguous(torch::stable::to(*position_weights, ScalarType::Double));
    STD_TORCH_CHECK(given.numel() == bag_size, "position_weights: expected one weight per bag position");
    std::copy_n(given.const_data_ptr<double>(), bag_size, weights.begin());
    for (int64_t i = 0; i < bag_size; ++i) {
      if (!(weights[i] >= 0.0 && weights[i] <= 1e300)) {
        throw std::invalid_argument("position_weights[" + std::to_string(i) + "] = " + std::to_string(weights[i]) +
                                    ": expected a finite weight >= 0");
      }
    }
  }
  std::vector<int64_t> valid(bag_size, reduction == "sum" ? 1 : 0);
  if (reduction == "mean") {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < bag_size; ++i) valid[i] += labels[r * bag_size + i] != ignore_index;
    }
  }
  double total = 0;
  for (int64_t i = 0; i < bag_size; ++i) total += valid[i] ? weights[i] : 0.0;
  for (int64_t i = 0; i < bag_size; ++i) weights[i] = valid[i] && total > 0 ? weights[i] / (total * valid[i]) : 0.0;
  return weights;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_multi_hot_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& labels, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& position_weights, const std::string& objective, int64_t ignore_index,
    const std::string& reduction, const std::optional<Tensor>& normalizer, std::optional<double> logit_softcap,
    double z_loss, double label_smoothing, std::optional<int64_t> chunk_size, bool grad_hidden, bool grad_weight,
    bool grad_bias) {
  STD_TORCH_CHECK(!bias && !grad_bias && objective == "mce" && !normalizer && !logit_softcap && z_loss == 0.0 &&
                      label_smoothing == 0.0 && (reduction == "mean" || reduction == "sum"),
                  "linear_multi_hot_cross_entropy: this build computes objective 'mce' with reduction 'mean' or 'sum' "
                  "and no bias, normalizer, logit_softcap, z_loss or label_smoothing");
  STD_TORCH_CHECK(hidden.dim() >= 1 && weight.dim() == 2 && hidden.size(hidden.dim() - 1) == weight.size(1),
                  "hidden, weight: expected [..., d] and [V, d]");
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "hidden, weight: expected one dtype");
  STD_TORCH_CHECK(!chunk_size || *chunk_size >= 1, "chunk_size: expected at least 1 row");
  // float16 is computed in float32: its logit gradients, about 1/(N V), are below its smallest number, scaled up their
  // sums over rows pass its largest, 65504, and few processors multiply float16 matrices any faster.
  const bool half = hidden.scalar_type() == ScalarType::Half;
  const Tensor h = flatten_rows(half ? torch::stable::to(hidden, ScalarType::Float) : hidden);  // [N, d]
  const Tensor w = half ? torch::stable::to(weight, ScalarType::Float) : weight;                // [V, d]
  const int64_t rows = h.size(0), d = h.size(1), vocabulary = w.size(0);
  const Tensor y = as_int64("labels", labels);
  STD_TORCH_CHECK(rows ? y.numel() % rows == 0 && y.numel() > 0 : y.numel() == 0, "labels: expected [..., bag_size]");
  const int64_t bag_size = rows ? y.numel() / rows : 1;
  const int64_t* label_data = y.const_data_ptr<int64_t>();
  const int64_t bad = find_out_of_range(label_data, y.numel(), vocabulary, ignore_index);
  if (bad >= 0) throw_out_of_range("labels", y, label_data, bad, vocabulary);
  const DType dtype = dtype_of("hidden", h);
  const bool wide = dtype != kBFloat16;
  const ScalarType accumulation = accumulation_type(dtype);

  std::vector<double> scale(bag_size, 0.0);
  if (rows) scale = position_scale(label_data, rows, bag_size, ignore_index, position_weights, reduction);
  const int64_t element_size = static_cast<int64_t>(h.element_size());
  const int64_t chunk = chunk_size ? std::min(*chunk_size, std::max<int64_t>(1, rows))
                                   : default_chunk_size(rows, vocabulary, element_size);
  const bool gradient = grad_hidden || grad_weight;
  const std::vector<int64_t> none = {0};
  Tensor dh = grad_hidden ? torch::stable::new_empty(hidden, {rows, d}, accumulation)
                          : torch::stable::new_empty(hidden, none, accumulation);
  Tensor dw = grad_weight ? torch::stable::new_empty(weight, {vocabulary, d}, accumulation)
                          : torch::stable::new_empty(weight, none, accumulation);
  if (grad_weight && rows == 0) torch::stable::zero_(dw);
  const Tensor logits = torch::stable::new_empty(h, {rows ? chunk : 0, vocabulary});
  const Tensor weight_t = torch::stable::transpose(w, 0, 1);
  std::vector<double> loss(rows), lse(rows);

  // Gradients of bfloat16 GEMMs come out rounded; at most 16 MiB of them wait to be added to the float32 sums.
  const int64_t staged_rows = std::max<int64_t>(1, (int64_t(16) << 20) / std::max<int64_t>(1, d * element_size));
  Tensor staged;
  if (!wide && gradient) {
    const int64_t most = std::max(grad_hidden ? chunk : 0, grad_weight ? std::min(staged_rows, vocabulary) : 0);
    staged = torch::stable::new_empty(h, {most, d});
  }

  for (int64_t start = 0; start < rows; start += chunk) {
    const int64_t size = std::min(chunk, rows - start);
    Tensor z = torch::stable::narrow(const_cast<Tensor&>(logits), 0, 0, size);
    Tensor h_chunk = torch::stable::narrow(const_cast<Tensor&>(h), 0, start, size);
    addmm(z, h_chunk, weight_t, 0.0);

    const LossRows args{
        z.mutable_data_ptr(), vocabulary,   vocabulary, label_data + start * bag_size, bag_size,
        ignore_index,         scale.data(), gradient,   loss.data() + start,           lse.data() + start};
    const LossRowsFn kernel = kernels().loss_rows[dtype];
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, vocabulary));
    torch::stable::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

    if (grad_hidden) {
      const Tensor target = torch::stable::narrow(dh, 0, start, size);
      if (wide) {
        addmm(target, z, w, 0.0);
      } else {
        const Tensor part = torch::stable::narrow(staged, 0, 0, size);
        addmm(part, z, w, 0.0);
        accumulate(target, part, false);
      }
    }
    if (grad_weight && wide) {
      addmm(dw, torch::stable::transpose(z, 0, 1), h_chunk, start ? 1.0 : 0.0);
    } else if (grad_weight) {
      for (int64_t v = 0; v < vocabulary; v += staged_rows) {
        const int64_t count = std::min(staged_rows, vocabulary - v);
        Tensor columns = torch::stable::narrow(z, 1, v, count);
        const Tensor part = torch::stable::narrow(staged, 0, 0, count);
        addmm(part, torch::stable::transpose(columns, 0, 1), h_chunk, 0.0);
        accumulate(torch::stable::narrow(dw, 0, v, count), part, start > 0);
      }
    }
  }

  double total = 0;
  for (const double l : loss) total += l;  // in the order of the rows, whatever the chunks and threads were
  Tensor loss_out = torch::stable::new_empty(hidden, {}, accumulation);
  torch::stable::fill_(loss_out, total);
  Tensor lse_out = torch::stable::new_empty(hidden, {rows}, accumulation);
  if (dtype == kFloat64) {
    std::copy(lse.begin(), lse.end(), lse_out.mutable_data_ptr<double>());
  } else {
    std::copy(lse.begin(), lse.end(), lse_out.mutable_data_ptr<float>());
  }
  std::vector<int64_t> hidden_shape(hidden.sizes().begin(), hidden.sizes().end());
  return {loss_out, lse_out, grad_hidden ? torch::stable::view(dh, hidden_shape) : dh, dw,
          torch::stable::new_empty(weight, none, accumulation)};
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CPU, m) {
  m.impl("linear_multi_hot_cross_entropy", TORCH_BOX(&linear_multi_hot_cross_entropy));
}

}  // namespace tst::cpu
