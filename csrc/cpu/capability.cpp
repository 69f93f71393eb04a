// Chooses the instruction set at run time: the best this processor runs, unless TST_CPU_CAPABILITY or
// set_capability says otherwise.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace tst::cpu {

namespace isa_default {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const Kernels table;
}
namespace isa_avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Capability {
  const char* name;
  const Kernels* table;
};

const std::vector<Capability>& available() {
  static const std::vector<Capability> list = [] {
    std::vector<Capability> found = {{"default", &isa_default::table}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &isa_avx2::table});
    if (found.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back({"avx512", &isa_avx512::table});
    }
#endif
    return found;
  }();
  return list;
}

const Capability* find(const std::string& name) {
  for (const Capability& c : available()) {
    if (name == c.name) return &c;
  }
  std::string message = "CPU capability (TST_CPU_CAPABILITY): got '" + name + "', this processor and build offer:";
  for (const Capability& c : available()) message += std::string(" ") + c.name;
  throw std::invalid_argument(message);
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> chosen = [] {
    const char* name = std::getenv("TST_CPU_CAPABILITY");
    return name && *name ? find(name) : &available().back();
  }();
  return chosen;
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Capability& c : available()) names.push_back(c.name);
  return names;
}

std::string capability() { return current().load()->name; }

void set_capability(const std::string& name) { current().store(find(name)); }

const Kernels& kernels() { return *current().load()->table; }

}  // namespace tst::cpu
