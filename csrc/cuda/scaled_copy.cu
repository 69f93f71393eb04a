// scaled_copy_ on CUDA.
#include "scaled_copy.h"

#include "op.h"

namespace tst::cuda {

void scaled_copy_(Tensor out, const Tensor& source, const Tensor& factor) {
  check_same_device("out, source", out, source);
  check_same_device("source, factor", source, factor);
  STD_TORCH_CHECK(source.scalar_type() == ScalarType::Float && factor.scalar_type() == ScalarType::Float,
                  "source, factor: expected float32");
  STD_TORCH_CHECK(out.is_contiguous() && source.is_contiguous() && out.numel() == source.numel() && factor.numel() == 1,
                  "out, source, factor: expected contiguous tensors of one size, and a scalar");
  if (out.numel() == 0) return;
  const Current current(out);
  const auto launch = [&](auto type, auto n) {
    using O = decltype(type);
    constexpr int64_t kThreads = 256;
    current.launch(scaled_copy_kernel<O, n()>, {blocks_for(out.numel(), kThreads * n()), kThreads}, data<float>(source),
                   data<float>(factor), mutable_data<O>(out), out.numel());
  };
  const auto address = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const bool aligned = address(out) % 16 == 0 && address(source) % 16 == 0;
  const auto launch_as = [&](auto type) {
    if (aligned)
      launch(type, std::integral_constant<int, 8>{});
    else
      launch(type, std::integral_constant<int, 1>{});
  };
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16 || out.scalar_type() == ScalarType::Half,
                  "out: expected bfloat16 or float16");
  out.scalar_type() == ScalarType::BFloat16 ? launch_as(BFloat16{}) : launch_as(Float16{});
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) { m.impl("scaled_copy_", TORCH_BOX(&scaled_copy_)); }

}  // namespace tst::cuda
