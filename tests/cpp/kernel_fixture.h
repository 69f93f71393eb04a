// What tests of the raw CPU kernels share: the dtype and the instruction set are a test's parameters.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "stored.h"

namespace tst::cpu {

constexpr int64_t kIgnore = -100;

class KernelTest : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  void SetUp() override { set_capability(std::get<0>(GetParam())); }
  DType dtype() const { return std::get<1>(GetParam()); }
  double accumulation_eps() const { return eps(dtype() == kFloat64 ? kFloat64 : kFloat32); }
  std::mt19937_64 random{7};
  double normal() { return std::normal_distribution<double>()(random); }
};

inline auto all_dtypes() { return testing::Values(kFloat32, kBFloat16, kFloat16, kFloat64); }

}  // namespace tst::cpu
