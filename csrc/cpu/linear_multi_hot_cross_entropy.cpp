// linear_multi_hot_cross_entropy on CPU: per chunk of rows one GEMM for the logits, one pass of ours that turns them
// into their gradient, two GEMMs. The full logits [N, V] never exist.
#include "gemm.h"
#include "memory.h"
#include "row_loss.h"

namespace tst::cpu {
namespace {

void accumulate(const Tensor& out, const Tensor& source, bool add) {
  const Accumulate args{source.const_data_ptr(), static_cast<float*>(out.mutable_data_ptr()), add};
  const AccumulateFn kernel = kernels().accumulate_bfloat16;
  torch::stable::parallel_for(0, source.numel(), 16384, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void column_sum(const Tensor& out, const Tensor& source, bool add) {
  const ColumnSum args{source.const_data_ptr(), source.size(1), source.size(0), out.mutable_data_ptr(), add};
  const ColumnSumFn kernel = kernels().column_sum[dtype_of("logits", source)];
  torch::stable::parallel_for(0, source.size(1), 1024, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Gradients of bfloat16 GEMMs come out rounded; this much of them waits to be added to the float32 sums. The second
// cache level holds it: with 16 MiB the GEMM and the addition take 1.3 to 2 times as long.
constexpr int64_t kStaged = kGemmScratch;

// Rows per chunk. Memory: at most an eighth of the full logits, 64 MiB, or half of the weight's gradient, which must
// exist anyway, whichever is most. Speed: the weight is read again for every chunk, and its gradient read and written,
// which from 256 to 512 rows saves another 4 % of the GEMMs (V = 128256, d = 1024), to 1024 rows 6 % (32768, 2048).
int64_t default_chunk_size(int64_t rows, int64_t vocabulary, int64_t element_size, int64_t gradient_columns) {
  const int64_t row = std::max<int64_t>(1, vocabulary * element_size);
  const int64_t floor = ((int64_t(64) << 20) - kGemmScratch) / row;  // the GEMM's blocks of logits included
  const int64_t eighth = std::min<int64_t>(rows / 8 - (kGemmScratch + row - 1) / row, 512);
  return std::max<int64_t>({1, floor, eighth, std::min<int64_t>(gradient_columns / 2, 1024)});
}

// The weight as its GEMMs take it: as it is, or converted to float32 a block of rows at a time. Converted as a whole it
// would take another 4 V d bytes.
class Weight {
 public:
  Weight(const Tensor& weight, bool convert)
      : weight_(weight), block_(std::max<int64_t>(1, weight.size(0))), convert_(convert) {
    if (!convert) return;
    block_ = std::min(block_, std::max<int64_t>(1, kConverted / std::max<int64_t>(1, weight.size(1))));
    converted_ = torch::stable::new_empty(weight, {block_, weight.size(1)}, ScalarType::Float);
  }

  int64_t block() const { return block_; }

  // Rows [start, start + count), until the next call; count <= block(), and the same each time for a start.
  Tensor rows(int64_t start, int64_t count) {
    const Tensor part = torch::stable::narrow(weight_, 0, start, count);
    if (!convert_) return part;
    Tensor out = torch::stable::narrow(converted_, 0, 0, count);
    if (start != converted_start_) torch::stable::copy_(out, part);  // a small weight is converted once
    converted_start_ = start;
    return out;
  }

 private:
  static constexpr int64_t kConverted = int64_t(1) << 22;  // elements, 16 MiB

  Tensor weight_, converted_;
  int64_t block_, converted_start_ = -1;
  bool convert_;
};

std::optional<Tensor> part_of_bias(const std::optional<Tensor>& bias, int64_t start, int64_t count) {
  if (!bias) return std::nullopt;
  return torch::stable::narrow(const_cast<Tensor&>(*bias), 0, start, count);
}

// Equal parts of at most `most`; 0 for no rows.
int64_t part_of(int64_t rows, int64_t most) {
  const int64_t parts = rows / most + (rows % most != 0);
  return parts ? (rows + parts - 1) / parts : 0;
}

// Without gradients no logit is needed twice: the row kernel takes blocks of columns out of the cache as they come.
// Over the GEMM alone 1.05 in place of 1.1 to 1.2 with a chunk of whole rows (float32, 512 to 2048 x 512 x 32768).
void forward_alone(RowLoss& loss, const Tensor& h, Weight& w, const std::optional<Tensor>& b, int64_t vocabulary,
                   int64_t chunk) {
  const int64_t rows = h.size(0);
  const int64_t block = std::min(w.block(), 2 * logits_block_columns(chunk, static_cast<int64_t>(h.element_size())));
  const Tensor scratch = torch::stable::new_empty(h, {chunk, block});
  for (int64_t start = 0; start < rows; start += chunk) {
    const Tensor h_chunk = torch::stable::narrow(const_cast<Tensor&>(h), 0, start, std::min(chunk, rows - start));
    for (int64_t v = 0; v < vocabulary; v += block) {
      const int64_t count = std::min(block, vocabulary - v);
      loss.run_block(start, v, logits_block(scratch, h_chunk, w.rows(v, count), part_of_bias(b, v, count), 0, count));
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_multi_hot_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& labels, const Tensor& label_scale,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& grad_loss, const std::optional<Tensor>& grad_lse,
    TST_LOSS_PARAMETERS, const std::string& reduction, std::optional<int64_t> chunk_size, bool grad_hidden,
    bool grad_weight, bool grad_bias) {
  STD_TORCH_CHECK(hidden.dim() >= 1 && weight.dim() == 2 && hidden.size(hidden.dim() - 1) == weight.size(1),
                  "hidden, weight: expected [..., d] and [V, d]");
  STD_TORCH_CHECK(
      hidden.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == weight.scalar_type()),
      "hidden, weight, bias: expected one dtype");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias: expected [V]");
  STD_TORCH_CHECK(bias || !grad_bias, "grad_bias: there is no bias");
  STD_TORCH_CHECK(!chunk_size || *chunk_size >= 1, "chunk_size: expected at least 1 row");
  // float16 is computed in float32: its logit gradients, about 1/(N V), are below its smallest number, scaled up their
  // sums over rows pass its largest, 65504, and few processors multiply float16 matrices any faster. bfloat16 is where
  // the processor does not multiply it.
  const ScalarType given = hidden.scalar_type();
  const bool convert = given == ScalarType::Half || (given == ScalarType::BFloat16 && !bfloat16_gemms());
  const Tensor h = flatten_rows(convert ? torch::stable::to(hidden, ScalarType::Float) : hidden);  // [N, d]
  Weight w(weight, convert);                                                                       // [V, d]
  std::optional<Tensor> b = bias;
  if (convert && bias) b = torch::stable::to(*bias, ScalarType::Float);
  if (b) b = torch::stable::contiguous(*b);
  const int64_t rows = h.size(0), d = h.size(1), vocabulary = weight.size(0);
  const DType dtype = dtype_of("hidden", h);
  const bool wide = dtype != kBFloat16;
  const ScalarType accumulation = accumulation_type(dtype);
  RowLoss loss(rows, vocabulary, labels, label_scale, grad_loss, grad_lse, TST_LOSS_OPTIONS);

  const int64_t element_size = static_cast<int64_t>(h.element_size());
  const bool gradient = grad_hidden || grad_weight || grad_bias;
  const int64_t default_size = gradient ? default_chunk_size(rows, vocabulary, element_size, grad_weight ? d : 0) : 512;
  const int64_t chunk = part_of(rows, chunk_size.value_or(default_size));
  const std::vector<int64_t> none = {0};
  Tensor dh = grad_hidden ? torch::stable::new_empty(hidden, {rows, d}, accumulation)
                          : torch::stable::new_empty(hidden, none, accumulation);
  Tensor dw = grad_weight ? with_huge_pages(torch::stable::new_empty(weight, {vocabulary, d}, accumulation))
                          : torch::stable::new_empty(weight, none, accumulation);
  Tensor db = torch::stable::new_empty(weight, {grad_bias ? vocabulary : 0}, accumulation);
  if (rows == 0) torch::stable::zero_(dw), torch::stable::zero_(db);
  if (vocabulary == 0) torch::stable::zero_(dh);  // no block of the weight writes it
  if (!gradient) forward_alone(loss, h, w, b, vocabulary, chunk);
  const Tensor buffer = with_huge_pages(torch::stable::new_empty(h, {gradient ? chunk : 0, vocabulary}));
  const int64_t staged_rows = std::max<int64_t>(1, kStaged / std::max<int64_t>(1, d * element_size));
  Tensor staged;
  if (!wide && gradient) {
    const int64_t count = std::max(grad_hidden ? chunk : 0, grad_weight ? std::min(staged_rows, vocabulary) : 0);
    staged = torch::stable::new_empty(h, {count, d});
  }

  for (int64_t start = 0; gradient && start < rows; start += chunk) {
    const int64_t size = std::min(chunk, rows - start);
    Tensor z = torch::stable::narrow(const_cast<Tensor&>(buffer), 0, 0, size);
    Tensor h_chunk = torch::stable::narrow(const_cast<Tensor&>(h), 0, start, size);
    for (int64_t v = 0; v < vocabulary; v += w.block()) {
      const int64_t count = std::min(w.block(), vocabulary - v);
      logits(torch::stable::narrow(z, 1, v, count), h_chunk, w.rows(v, count), part_of_bias(b, v, count));
    }
    loss.run(start, z, true);

    if (grad_hidden && vocabulary > 0) {
      const Tensor target = torch::stable::narrow(dh, 0, start, size);
      const Tensor product = wide ? target : torch::stable::narrow(staged, 0, 0, size);
      for (int64_t v = 0; v < vocabulary; v += w.block()) {
        const int64_t count = std::min(w.block(), vocabulary - v);
        tst::cpu::grad_hidden(product, torch::stable::narrow(z, 1, v, count), w.rows(v, count), v > 0);
      }
      if (!wide) accumulate(target, product, false);
    }
    if (grad_bias) column_sum(db, z, start > 0);
    if (grad_weight && wide) {
      tst::cpu::grad_weight(dw, z, h_chunk, start > 0);
    } else if (grad_weight) {
      for (int64_t v = 0; v < vocabulary; v += staged_rows) {
        const int64_t count = std::min(staged_rows, vocabulary - v);
        Tensor columns = torch::stable::narrow(z, 1, v, count);
        const Tensor part = torch::stable::narrow(staged, 0, 0, count);
        tst::cpu::grad_weight(part, columns, h_chunk, false);
        accumulate(torch::stable::narrow(dw, 0, v, count), part, start > 0);
      }
    }
  }

  const auto [value, lse] = loss.results(h, reduction);
  std::vector<int64_t> hidden_shape(hidden.sizes().begin(), hidden.sizes().end());
  return {value, lse, grad_hidden ? torch::stable::view(dh, hidden_shape) : dh, dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CPU, m) {
  m.impl("linear_multi_hot_cross_entropy", TORCH_BOX(&linear_multi_hot_cross_entropy));
}

}  // namespace tst::cpu
