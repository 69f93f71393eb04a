// Every op schema, and the pybind11 module whose import registers them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "tensor.h"

STABLE_TORCH_LIBRARY(tst_ext, m) {
  // input_ids [..., bag_size] int64 or int32, weight [V, d] -> [..., d]; mode "mean" or "sum". Ids equal to padding_idx
  // count for nothing; position_weights [bag_size].
  m.def(
      "bag_embedding(Tensor input_ids, Tensor weight, str mode, *, int? padding_idx=None, "
      "Tensor? position_weights=None) -> Tensor");
  m.def(
      "bag_embedding_backward(Tensor grad, Tensor input_ids, SymInt num_embeddings, str mode, *, "
      "int? padding_idx=None, Tensor? position_weights=None) -> Tensor");

  // hidden [..., d], weight [V, d], bias [V], labels [..., s] with one bag per row of hidden. label_scale [s]
  // or [N, s]: what a valid label weighs in the loss, normalisation included. reduction "sum" or "none": a scalar or
  // [N]. grad_loss (a scalar or [N]) and grad_lse [N] are upstream gradients; without them that of the loss is 1, that
  // of lse 0. Returns the loss, lse [N], and the gradients asked for (else empty); those of 16-bit inputs are float32,
  // so that an upstream gradient can still multiply them before the last rounding. But bfloat16 gradients of hidden and
  // weight are bfloat16 except on the CPU: float32 would cost memory and time.
  m.def(
      "linear_multi_hot_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor label_scale, *, "
      "Tensor? bias=None, Tensor? grad_loss=None, Tensor? grad_lse=None, " TST_LOSS_SCHEMA
      ", str reduction='sum', SymInt? chunk_size=None, bool grad_hidden=False, bool grad_weight=False, bool "
      "grad_bias=False) "
      "-> (Tensor loss, Tensor lse, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  // The same of logits [..., V] that exist already.
  m.def("multi_hot_cross_entropy(Tensor logits, Tensor labels, Tensor label_scale, *, " TST_LOSS_SCHEMA
        ", str reduction='sum') -> (Tensor loss, Tensor lse)");
  // One pass over rows of logits [N, V], at any row stride: fills loss and lse [N] and with `gradient` writes the
  // logits' gradient over them. The backward pass of multi_hot_cross_entropy, and what lies between the GEMMs of
  // linear_multi_hot_cross_entropy on a GPU, and of the vocabulary-parallel one everywhere.
  m.def(
      "multi_hot_cross_entropy_rows_(Tensor(a!) logits, Tensor labels, Tensor label_scale, Tensor(b!) loss, "
      "Tensor(c!) lse, *, Tensor? grad_loss=None, Tensor? grad_lse=None, " TST_LOSS_SCHEMA
      ", bool gradient=False) -> ()");
  // out = factor * source, rounded once to out's 16-bit dtype. source: float32 or of that dtype, then also out itself,
  // which a factor of 1 leaves unread. factor: a float32 scalar.
  m.def("scaled_copy_(Tensor(a!) out, Tensor source, Tensor factor) -> ()");
}

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {  // its state is atomic
  m.doc() = "Registers the tst_ext ops; build facts and the choice of CPU instruction set.";
  m.def("cpu_capabilities", &tst::cpu::capabilities, "Instruction sets that this processor runs, the best last.");
  m.def("cpu_capability", &tst::cpu::capability, "The instruction set in use.");
  m.def("set_cpu_capability", &tst::cpu::set_capability, pybind11::arg("name"));
  m.def("cpu_gemms", &tst::cpu::gemms, "Choices of the library that multiplies matrices on CPU.");
  m.def("cpu_gemm", &tst::cpu::gemm, "The choice in force.");
  m.def("set_cpu_gemm", &tst::cpu::set_gemm, pybind11::arg("name"));
  m.def("cpu_bfloat16_gemms", &tst::cpu::bfloat16_gemms,
        "Whether bfloat16 matrices are multiplied as they are on CPU, not in float32.");
  m.def("set_cpu_bfloat16_gemms", &tst::cpu::set_bfloat16_gemms, pybind11::arg("as_they_are"));
  m.def("advise_huge_pages", &tst::cpu::advise_huge_pages, pybind11::arg("address"), pybind11::arg("nbytes"),
        "Asks for huge pages under a large block that nothing has been written to; elsewhere than on Linux nothing.");
}
