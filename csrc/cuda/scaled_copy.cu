// scaled_copy_ on CUDA.
#include "scaled_copy.h"

#include "op.h"

namespace tst::cuda {

void scaled_copy_(Tensor out, const Tensor& source, const Tensor& factor) {
  check_same_device("out, source", out, source);
  check_same_device("source, factor", source, factor);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16 || out.scalar_type() == ScalarType::Half,
                  "out: expected bfloat16 or float16");
  const bool wide = source.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK((wide || source.scalar_type() == out.scalar_type()) && factor.scalar_type() == ScalarType::Float,
                  "source, factor: expected float32, or a source of out's dtype");
  STD_TORCH_CHECK(out.is_contiguous() && source.is_contiguous() && out.numel() == source.numel() && factor.numel() == 1,
                  "out, source, factor: expected contiguous tensors of one size, and a scalar");
  if (out.numel() == 0) return;
  const Current current(out);
  const auto launch = [&](auto from, auto to, auto n) {
    using S = decltype(from);
    using O = decltype(to);
    Extent extent{1, kScaledThreads};
    extent.grid.x = std::min(static_cast<unsigned>(current.resident(scaled_copy_kernel<S, O, n()>, extent)),
                             blocks_for(out.numel(), kScaledThreads * n()));
    current.launch(scaled_copy_kernel<S, O, n()>, extent, data<S>(source), data<float>(factor), mutable_data<O>(out),
                   out.numel());
  };
  const auto address = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const bool aligned = address(out) % 16 == 0 && address(source) % 16 == 0;
  const auto launch_from = [&](auto from, auto to) {
    if (aligned)
      launch(from, to, std::integral_constant<int, 8>{});
    else
      launch(from, to, std::integral_constant<int, 1>{});
  };
  const auto launch_to = [&](auto to) { wide ? launch_from(float{}, to) : launch_from(to, to); };
  out.scalar_type() == ScalarType::BFloat16 ? launch_to(BFloat16{}) : launch_to(Float16{});
}

STABLE_TORCH_LIBRARY_IMPL(tst_ext, CUDA, m) { m.impl("scaled_copy_", TORCH_BOX(&scaled_copy_)); }

}  // namespace tst::cuda
