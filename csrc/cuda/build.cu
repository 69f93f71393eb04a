// Facts of a build with CUDA, for csrc/library.cpp.
#include <string>

namespace tst::cuda {

std::string architectures() {
  const int list[] = {__CUDA_ARCH_LIST__};  // by nvcc
  std::string names;
  for (const int arch : list) names += (names.empty() ? "sm_" : ", sm_") + std::to_string(arch / 10);
  return names;
}

}  // namespace tst::cuda
