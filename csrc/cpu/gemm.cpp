#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

// As torch/csrc/inductor/aoti_torch/c/shim_cpu.h declares it, which 2.11 and 2.13 export; that header refuses
// TORCH_TARGET_VERSION. Weak: a torch without oneDNN lacks it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle input, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t scalars_len, const char** algorithm, AtenTensorHandle* out);

namespace tst::cpu {
namespace {

enum class Gemm : int { kAuto, kBlas, kOneDnn };
constexpr const char* kNames[] = {"auto", "blas", "onednn"};

bool has_onednn() { return &aoti_torch_cpu__linear_pointwise != nullptr; }

Gemm find(const std::string& name) {
  const std::vector<std::string> names = gemms();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) return static_cast<Gemm>(found - names.begin());
  std::string message = "CPU GEMM (TST_CPU_GEMM): got '" + name + "', this torch offers:";
  for (const std::string& n : names) message += " " + n;
  throw std::invalid_argument(message);
}

std::atomic<Gemm>& current() {
  static std::atomic<Gemm> chosen = [] {
    const char* name = std::getenv("TST_CPU_GEMM");
    return name && *name ? find(name) : Gemm::kAuto;
  }();
  return chosen;
}

bool dense(const Tensor& matrix) { return matrix.stride(1) == 1 && matrix.stride(0) == matrix.size(1); }

// A rule, not a measurement, so that a run repeats bit for bit. MKL takes the slower of its paths on AMD processors:
// for float32 with AVX-512 oneDNN needs 0.80 of its time for the logits and 0.92 for grad_hidden (Zen 4, 256 x 1024 x
// 128256). For grad_weight, whose operands are both transposed, it needs more. Below some million multiplications its
// call costs more than they do. For a weight that is no dense matrix it has nothing but a naive loop.
bool use_onednn(const Tensor& weight, int64_t multiplications) {
  if (weight.scalar_type() != ScalarType::Float || multiplications == 0 || !dense(weight)) return false;
  const Gemm chosen = current().load();
  if (chosen != Gemm::kAuto) return chosen == Gemm::kOneDnn;
#if defined(__x86_64__)
  static const bool faster = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") && has_onednn();
  return faster && multiplications >= int64_t(1) << 24;
#else
  return false;
#endif
}

// By instruction set, so that a run repeats bit for bit. Without these instructions torch's bfloat16 products take 4
// (AVX-512, Cascade Lake) to 25 times as long as float32's. oneDNN, whose products they are, uses AMX only next to
// avx512_bf16, and makes float32 products of AVX2's conversions.
bool has_bfloat16_instructions() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  return getauxval(AT_HWCAP2) & (1ul << 14);  // HWCAP2_BF16, which older headers lack
#else
  return false;  // macOS: Accelerate multiplies in float32
#endif
}

std::atomic<bool>& bfloat16_as_it_is() {
  static std::atomic<bool> chosen = has_bfloat16_instructions();
  return chosen;
}

// out = beta * c + a @ b, c broadcast to out's shape. torch_call_dispatcher cannot pass the Scalars of aten::addmm, so
// this is the C shim of the same CPU kernel.
void addmm(const Tensor& out, const Tensor& c, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), beta, 1.0));
}

// input [n, k] @ weight [m, k]^T + bias [m], in memory of its own.
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(input.get(), weight.get(), bias ? &bias_handle : nullptr,
                                                          "none", nullptr, 0, nullptr, &out));
  return Tensor(out);
}

}  // namespace

std::vector<std::string> gemms() {
  if (has_onednn()) return {kNames[0], kNames[1], kNames[2]};
  return {kNames[0], kNames[1]};
}

std::string gemm() { return kNames[static_cast<int>(current().load())]; }

void set_gemm(const std::string& name) { current().store(find(name)); }

bool bfloat16_gemms() { return bfloat16_as_it_is().load(); }

void set_bfloat16_gemms(bool as_they_are) { bfloat16_as_it_is().store(as_they_are); }

int64_t logits_block_columns(int64_t rows, int64_t element_size) {
  return std::max<int64_t>(1024, kGemmScratch / std::max<int64_t>(1, rows * element_size));
}

Tensor logits_block(const Tensor& scratch, const Tensor& hidden, const Tensor& weight,
                    const std::optional<Tensor>& bias, int64_t start, int64_t count) {
  const int64_t rows = hidden.size(0);
  Tensor w = torch::stable::narrow(const_cast<Tensor&>(weight), 0, start, count);
  std::optional<Tensor> b;
  if (bias) b = torch::stable::narrow(const_cast<Tensor&>(*bias), 0, start, count);
  if (use_onednn(w, rows * count * hidden.size(1))) return linear(hidden, w, b);
  Tensor some = torch::stable::narrow(const_cast<Tensor&>(scratch), 0, 0, rows);
  const Tensor out = torch::stable::narrow(some, 1, 0, count);
  addmm(out, b ? *b : out, hidden, torch::stable::transpose(w, 0, 1), b ? 1.0 : 0.0);
  return out;
}

void logits(const Tensor& out, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t rows = out.size(0), vocabulary = out.size(1);
  if (!use_onednn(weight, rows * vocabulary * hidden.size(1))) {
    return addmm(out, bias ? *bias : out, hidden, torch::stable::transpose(weight, 0, 1), bias ? 1.0 : 0.0);
  }
  // oneDNN's result is fresh memory each time. In blocks of 1 MiB it comes from the allocator's free lists and is still
  // cached when it is copied; as a whole, its page faults cost 10 % of the GEMM.
  const int64_t block = logits_block_columns(rows, static_cast<int64_t>(out.element_size()));
  for (int64_t v = 0; v < vocabulary; v += block) {
    Tensor columns = torch::stable::narrow(const_cast<Tensor&>(out), 1, v, std::min(block, vocabulary - v));
    const Tensor block_logits = logits_block(columns, hidden, weight, bias, v, columns.size(1));
    if (block_logits.const_data_ptr() != columns.const_data_ptr()) torch::stable::copy_(columns, block_logits);
  }
}

void grad_hidden(const Tensor& out, const Tensor& grad_logits, const Tensor& weight, bool add) {
  if (add || !use_onednn(weight, grad_logits.numel() * out.size(1))) {
    return addmm(out, out, grad_logits, weight, add ? 1.0 : 0.0);
  }
  Tensor target = out;
  torch::stable::copy_(target, linear(grad_logits, torch::stable::transpose(weight, 0, 1), std::nullopt));
}

void grad_weight(const Tensor& out, const Tensor& grad_logits, const Tensor& hidden, bool add) {
  addmm(out, out, torch::stable::transpose(grad_logits, 0, 1), hidden, add ? 1.0 : 0.0);
}

}  // namespace tst::cpu
