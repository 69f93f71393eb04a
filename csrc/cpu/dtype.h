// torch's dtypes in the terms of the raw kernels.
#pragma once

#include "../tensor.h"
#include "kernels.h"

namespace tst::cpu {

inline DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
  }
}

inline ScalarType accumulation_type(DType dtype) { return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float; }

}  // namespace tst::cpu
