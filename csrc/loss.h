// The loss of a row of logits: its formulas, its options with their one check, and the part of the computation that the
// row kernels of both devices share. No torch, no CUDA runtime.
//
// A row's raw logits x are capped, z = logit_softcap * tanh(x / logit_softcap) (z = x for a cap of 0). With
// e = label_smoothing, c_i = label_scale[i] (the same for all rows, or the row's own) where labels[i] is not
// ignore_index, else 0, and S = sum c_i (kMceAlt: label_scale[0] where any label counts, else 0):
//   lse  = m + log sum_v exp(z_v - m), m = max z
//   fit  = sum_i c_i (lse - z[labels[i]])                               kMce
//        = S (lse - log sum_{v in set(labels)} exp z_v)                 kMceAlt
//   loss = (1 - e) fit + e S (lse - mean_v z_v) + z_loss S lse^2        the mean over the V' columns with z > -inf
// and, with g = grad_loss and u = grad_lse of the row, the gradient of x_v is
//   ((g S (1 + 2 z_loss lse) + u) softmax(z)_v - g (1 - e) a_v - g e S / V') (1 - (z_v / logit_softcap)^2)
//   a_v  = sum_{i : labels[i] = v} c_i                                  kMce
//        = S exp(z_v) / sum_{w in set(labels)} exp z_w                  kMceAlt, for v in the set
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define TST_HOST_DEVICE __host__ __device__
#else
#define TST_HOST_DEVICE
#endif

namespace tst {

enum class Objective : int { kMce, kMceAlt };

struct LossOptions {
  Objective objective = Objective::kMce;
  int64_t ignore_index = -100;
  double logit_softcap = 0;  // 0: none
  double z_loss = 0;
  double label_smoothing = 0;

  bool plain() const { return logit_softcap == 0 && label_smoothing == 0; }  // the kernels need no logit, only exp(z)
};

// The options in an op's schema, in the parameters of its C++ functions, and from these to the struct.
#define TST_LOSS_SCHEMA                                                                       \
  "str objective='mce', int ignore_index=-100, float? logit_softcap=None, float z_loss=0.0, " \
  "float label_smoothing=0.0"
#define TST_LOSS_PARAMETERS                                                                               \
  const std::string &objective, int64_t ignore_index, std::optional<double> logit_softcap, double z_loss, \
      double label_smoothing
#define TST_LOSS_OPTIONS ::tst::checked_options(objective, ignore_index, logit_softcap, z_loss, label_smoothing)

// Throws std::invalid_argument, which Python sees as ValueError.
inline LossOptions checked_options(TST_LOSS_PARAMETERS) {
  const auto check = [](bool valid, const std::string& message) {
    if (!valid) throw std::invalid_argument(message);
  };
  check(objective == "mce" || objective == "mce_alt",
        "objective: expected 'mce' or 'mce_alt', got '" + objective + "'");
  check(!logit_softcap || (*logit_softcap > 0 && *logit_softcap < HUGE_VAL),
        "logit_softcap: expected a finite number > 0");
  check(z_loss >= 0 && z_loss < HUGE_VAL, "z_loss: expected a finite number >= 0");
  check(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing: expected 0 to 1");
  return {objective == "mce" ? Objective::kMce : Objective::kMceAlt, ignore_index, logit_softcap.value_or(0.0), z_loss,
          label_smoothing};
}

// Of the columns of a row so far.
template <typename A>
struct alignas(16) RowSums {
  A maximum = -static_cast<A>(HUGE_VAL);  // m, of z
  A exps = 0;                             // sum_v exp(z_v - m)
  A logits = 0;  // sum of z_v - m where z_v > -inf, and the number of those, for smoothing only
  A columns = 0;
};

// The loss of a row, and what its gradient is made of: at column v factor * exp(z_v - m) - pull * a_v - uniform, the
// last where z_v > -inf.
template <typename A>
struct RowTerms {
  A loss, lse, factor, pull, uniform;
  bool nothing;  // to learn, whatever the row's logits are
};

// Differences are taken from m rather than from lse: lse near 1e4 would cost three digits in float32. Static: the CPU
// kernels are compiled for several instruction sets, and the linker would keep one of them for all.
template <typename A>
TST_HOST_DEVICE static RowTerms<A> row_terms(const LossOptions& options, const RowSums<A>& sums, A log_sum, A scale,
                                             A fit, A grad_loss, A grad_lse) {
  const A z_loss = static_cast<A>(options.z_loss), smoothing = static_cast<A>(options.label_smoothing);
  const A lse = sums.maximum + log_sum, factor = grad_loss * scale * (1 + 2 * z_loss * lse) + grad_lse;
  A loss = (1 - smoothing) * fit + z_loss * scale * lse * lse, uniform = 0;
  if (smoothing != 0) {
    loss += smoothing * scale * (log_sum - sums.logits / sums.columns);
    uniform = grad_loss * smoothing * scale / sums.columns;
  }
  const bool nothing = (scale == 0 || grad_loss == 0) && grad_lse == 0;
  return {scale == 0 ? A(0) : loss, lse, factor / sums.exps, grad_loss * (1 - smoothing), uniform, nothing};
}

}  // namespace tst
