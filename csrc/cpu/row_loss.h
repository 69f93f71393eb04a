// Calls of the row kernel on CPU, for all loss ops: tensors in its terms, threads, results.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace tst::cpu {

class RowLoss {
 public:
  // labels [..., s] for `rows` rows; label_scale [s] or [rows, s]; grad_loss a scalar or one number a row; grad_lse
  // one a row.
  RowLoss(int64_t rows, int64_t vocabulary, const Tensor& labels, const Tensor& label_scale,
          const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse, const LossOptions& options)
      : labels_(as_int64("labels", labels)), label_scale_(numbers(label_scale)), loss_(rows), lse_(rows) {
    const int64_t count = labels_.numel(), dims = label_scale.dim();
    const int64_t bag_size = dims == 1 || dims == 2 ? label_scale.size(dims - 1) : 0;
    STD_TORCH_CHECK(bag_size >= 1 && count == rows * bag_size && (dims == 1 || label_scale.size(0) == rows),
                    "labels, label_scale: expected [..., s] for each row, and [s] or [rows, s]");
    const int64_t* data = labels_.const_data_ptr<int64_t>();
    const int64_t bad = find_out_of_range(data, count, vocabulary, options.ignore_index);
    if (bad >= 0) throw_out_of_range("labels", labels_, data, bad, vocabulary);
    if (grad_loss) {
      grad_loss_ = numbers(*grad_loss);
      if (grad_loss->dim() == 0) grad_loss_.resize(rows, grad_loss_[0]);
      STD_TORCH_CHECK(grad_loss->dim() <= 1 && static_cast<int64_t>(grad_loss_.size()) == rows,
                      "grad_loss: expected a scalar or one a row");
    }
    if (grad_lse) {
      grad_lse_ = numbers(*grad_lse);
      STD_TORCH_CHECK(grad_lse->dim() == 1 && static_cast<int64_t>(grad_lse_.size()) == rows,
                      "grad_lse: expected one number a row");
    }
    args_.vocabulary = vocabulary;
    args_.bag_size = bag_size;
    args_.label_scale = label_scale_.data();
    args_.scale_stride = dims == 2 ? bag_size : 0;
    args_.options = options;
  }

  // Rows [start, start + logits.size(0)); logits [*, V], overwritten by their gradient if asked for.
  void run(int64_t start, const Tensor& logits, bool gradient) { run_kernel(args_, start, logits, gradient); }

  // The same without gradient for logits that come in blocks [*, n] of columns, in order.
  void run_block(int64_t start, int64_t column, const Tensor& logits) {
    LossRows args = args_;
    partial_.resize(loss_.size()), label_logits_.resize(loss_.size() * args.bag_size);
    args.partial = partial_.data() + start;
    args.label_logits = label_logits_.data() + start * args.bag_size;
    args.block_start = column;
    args.block_columns = logits.size(1);
    run_kernel(args, start, logits, false);
  }

  // The loss, one number a row or their sum, and lse [N]: in float32, or float64 where `like` is.
  std::tuple<Tensor, Tensor> results(const Tensor& like, const std::string& reduction) const {
    STD_TORCH_CHECK(reduction == "none" || reduction == "sum", "reduction: expected 'none' or 'sum', got '", reduction,
                    "'");
    if (reduction == "none") return {tensor(like, loss_), tensor(like, lse_)};
    double total = 0;
    for (const double l : loss_) total += l;  // in the order of the rows, whatever the chunks and threads were
    Tensor sum = torch::stable::new_empty(like, {}, accumulation_type(dtype_of("logits", like)));
    torch::stable::fill_(sum, total);
    return {sum, tensor(like, lse_)};
  }

 private:
  void run_kernel(LossRows args, int64_t start, const Tensor& logits, bool gradient) {
    args.logits = gradient ? logits.mutable_data_ptr() : const_cast<void*>(logits.const_data_ptr());
    args.stride = logits.stride(0);
    args.labels = labels_.const_data_ptr<int64_t>() + start * args.bag_size;
    args.label_scale += start * args.scale_stride;
    args.gradient = gradient;
    args.grad_loss = grad_loss_.empty() ? nullptr : grad_loss_.data() + start;
    args.grad_lse = grad_lse_.empty() ? nullptr : grad_lse_.data() + start;
    args.loss = loss_.data() + start;
    args.lse = lse_.data() + start;
    const LossRowsFn kernel = kernels().loss_rows[dtype_of("logits", logits)];
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, logits.size(1)));
    torch::stable::parallel_for(0, logits.size(0), grain,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  static std::vector<double> numbers(const Tensor& tensor) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Double));
    const double* data = wide.const_data_ptr<double>();
    return std::vector<double>(data, data + wide.numel());
  }

  static Tensor tensor(const Tensor& like, const std::vector<double>& values) {
    const ScalarType type = accumulation_type(dtype_of("logits", like));
    Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())}, type);
    if (type == ScalarType::Double) {
      std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
    } else {
      std::copy(values.begin(), values.end(), out.mutable_data_ptr<float>());
    }
    return out;
  }

  Tensor labels_;
  std::vector<double> label_scale_, grad_loss_, grad_lse_, loss_, lse_, label_logits_;
  std::vector<RowSums<double>> partial_;
  LossRows args_ = {};
};

}  // namespace tst::cpu
