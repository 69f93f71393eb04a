// Helpers on torch's tensors: the only header here that knows torch, through its stable ABI alone.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace tst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::out_of_range, which Python sees as IndexError, naming the value and its place.
[[noreturn]] inline void throw_out_of_range(const char* name, const Tensor& ids, const int64_t* data, int64_t flat,
                                            int64_t rows) {
  std::ostringstream message;
  message << name << '[';
  int64_t stride = ids.numel(), rest = flat;
  for (int64_t dim = 0; dim < ids.dim(); ++dim) {
    stride /= ids.size(dim);
    message << (dim ? ", " : "") << rest / stride;
    rest %= stride;
  }
  message << "] = " << data[flat] << " is out of range: expected 0 <= id < " << rows;
  throw std::out_of_range(message.str());
}

// Contiguous int64 copy of int32 or int64 ids; the tensor itself where it is that already.
inline Tensor as_int64(const char* name, const Tensor& ids) {
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, name, ": expected int64 or int32");
  return torch::stable::contiguous(type == ScalarType::Long ? ids : torch::stable::to(ids, ScalarType::Long));
}

inline Tensor flatten_rows(const Tensor& tensor) {  // [..., d] -> [N, d], contiguous
  const int64_t d = tensor.size(tensor.dim() - 1);
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) rows *= tensor.size(dim);
  return torch::stable::view(torch::stable::contiguous(tensor), {rows, d});
}

}  // namespace tst
