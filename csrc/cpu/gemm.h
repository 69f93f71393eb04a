// The GEMMs of linear_multi_hot_cross_entropy, by the faster of the two libraries that torch carries for float32.
#pragma once

#include <string>
#include <vector>

#include "dtype.h"

namespace tst::cpu {

// "auto", "blas" (aten::addmm: MKL on x86-64) or "onednn" (float32 by mkldnn::_linear_pointwise wherever it can), from
// TST_CPU_GEMM or set_gemm.
std::vector<std::string> gemms();  // those this torch offers
std::string gemm();
void set_gemm(const std::string& name);  // std::invalid_argument names what is available

// Whether bfloat16 matrices are multiplied as they are, or in float32. By the processor, unless set otherwise.
bool bfloat16_gemms();
void set_bfloat16_gemms(bool as_they_are);

// Bytes of logits that a oneDNN product in memory of its own has, where 1024 columns are not more.
constexpr int64_t kGemmScratch = int64_t(1) << 20;

// hidden [n, d], weight [V, d], bias [V], contiguous -> out [n, V]
void logits(const Tensor& out, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias);
// The same for columns [start, start + count) alone: in memory of the library's own, or in scratch [>= n, >= count].
Tensor logits_block(const Tensor& scratch, const Tensor& hidden, const Tensor& weight,
                    const std::optional<Tensor>& bias, int64_t start, int64_t count);
// Columns of a block: 1 MiB of logits, at least 1024 columns.
int64_t logits_block_columns(int64_t rows, int64_t element_size);
// grad_logits [n, V], weight [V, d] -> out [n, d], or added to it
void grad_hidden(const Tensor& out, const Tensor& grad_logits, const Tensor& weight, bool add);
// grad_logits [n, V], hidden [n, d] -> out [V, d], or added to it
void grad_weight(const Tensor& out, const Tensor& grad_logits, const Tensor& hidden, bool add);

}  // namespace tst::cpu
