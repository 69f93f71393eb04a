// The CUDA kernels behind the interface of the CPU's, run by the emulator.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace tst::cpu {

std::vector<std::tuple<std::string, DType>> emulations();  // ways to cut a row, and what each is compiled for
bool is_emulated(const std::string& name);
LossRowsFn emulated_loss_rows(const std::string& name, DType dtype);

}  // namespace tst::cpu
