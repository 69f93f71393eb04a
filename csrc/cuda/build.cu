// Facts of a build, for tst_ext/_load.py, which calls this through ctypes.
#include <string>

extern "C" __attribute__((visibility("default"))) const char* tst_cuda_architectures() {
  static const std::string names = [] {
    std::string list;
    for (const int arch : {__CUDA_ARCH_LIST__}) {  // by nvcc
      list += (list.empty() ? "sm_" : ", sm_") + std::to_string(arch / 10);
    }
    return list;
  }();
  return names.c_str();
}
