// The row pass of the loss against plain loops in long double, with every instruction set that this processor runs.
// The CUDA kernel goes through the same tests in emulation.
#include <cmath>

#include "emulated.h"
#include "kernel_fixture.h"

namespace tst::cpu {
namespace {

// The loss by each instruction set, and by the CUDA kernel as its emulation runs it.
class LossTest : public KernelTest {
 protected:
  void SetUp() override {
    const std::string& name = std::get<0>(GetParam());
    emulated_ = is_emulated(name) ? name : "";
    if (emulated_.empty()) set_capability(name);
  }

 public:
  static inline std::string emulated_;
};

LossRowsFn loss_rows(DType dtype) {
  return LossTest::emulated_.empty() ? kernels().loss_rows[dtype] : emulated_loss_rows(LossTest::emulated_, dtype);
}

// The formulas of loss.h, row by row in long double: a plain sum of thousands of doubles would err more than what it
// judges.
struct Expected {
  double loss, lse, size;  // size: of the terms of the loss, for its tolerance
  std::vector<double> gradient, gradient_size;
};

Expected expected_row(const std::vector<double>& x, const int64_t* labels, const LossRows& a, int64_t r) {
  const size_t n = x.size();
  const double* const weights = a.label_scale + r * a.scale_stride;
  const long double g = a.grad_loss ? a.grad_loss[r] : 1, u = a.grad_lse ? a.grad_lse[r] : 0,
                    e = a.options.label_smoothing;
  std::vector<long double> z(n), pull(n, 0);
  std::vector<bool> labelled(n, false);
  long double m = -INFINITY, sum = 0, scale = 0, mean = 0, columns = 0, set = 0, fit = 0;
  for (size_t v = 0; v < n; ++v) {
    z[v] = a.options.logit_softcap ? a.options.logit_softcap * std::tanh((long double)x[v] / a.options.logit_softcap)
                                   : (long double)x[v];
    m = std::max(m, z[v]);
    if (z[v] > -INFINITY) mean += z[v], columns += 1;
  }
  mean /= columns;
  for (const long double value : z) sum += std::exp(value - m);
  const long double lse = m + std::log(sum);
  for (int64_t i = 0; i < a.bag_size; ++i) {
    if (labels[i] == a.options.ignore_index) continue;
    scale = a.options.objective == Objective::kMce ? scale + weights[i] : weights[0];
    labelled[labels[i]] = true;
    if (a.options.objective == Objective::kMce) {
      pull[labels[i]] += weights[i];
      if (weights[i] != 0) fit += weights[i] * (m - z[labels[i]] + std::log(sum));
    }
  }
  if (a.options.objective == Objective::kMceAlt && scale != 0) {
    for (size_t v = 0; v < n; ++v) set += labelled[v] ? std::exp(z[v] - m) : 0.0L;
    for (size_t v = 0; v < n; ++v) pull[v] = labelled[v] ? scale * std::exp(z[v] - m) / set : 0.0L;
    fit = scale * std::log(sum / set);
  }
  Expected out;
  out.lse = double(lse);
  out.loss = scale == 0
                 ? 0.0
                 : double((1 - e) * fit + (e ? e * scale * (lse - mean) : 0) + a.options.z_loss * scale * lse * lse);
  out.size = double(fit + scale + a.options.z_loss * scale * lse * lse);
  for (size_t v = 0; v < n; ++v) {
    const long double p = std::exp(z[v] - m) / sum, attraction = g * scale * (1 + 2 * a.options.z_loss * lse) + u;
    const long double uniform = z[v] > -INFINITY ? g * e * scale / columns : 0.0L, t = z[v] / a.options.logit_softcap;
    const long double slope = a.options.logit_softcap ? 1 - t * t : 1.0L;
    const bool nothing = (scale == 0 || g == 0) && u == 0;
    out.gradient.push_back(nothing ? 0.0 : double((attraction * p - g * (1 - e) * pull[v] - uniform) * slope));
    // kMceAlt's pull is a quotient of exponentials, always in double; kMce's is a sum of a few numbers.
    const long double pulled = std::fabs(g) * pull[v] / (a.options.objective == Objective::kMce ? 16 : 2);
    out.gradient_size.push_back(double(std::fabs(attraction) * p + pulled + std::fabs(uniform)));
  }
  return out;
}

struct LossOptions {
  const char* name;
  Objective objective = Objective::kMce;
  double logit_softcap = 0, z_loss = 0, label_smoothing = 0;
  bool upstream = false;  // and each row has weights of its own
};

const LossOptions kLossOptions[] = {
    // the first three take every branch
    {"plain"},
    {"everything", Objective::kMce, 5, 0.1, 0.2, true},
    {"mce_alt, everything", Objective::kMceAlt, 4, 0.1, 0.2, true},
    {"upstream", Objective::kMce, 0, 0, 0, true},
    {"mce_alt", Objective::kMceAlt},
    {"softcap", Objective::kMce, 4},
    {"z-loss", Objective::kMce, 0, 0.1},
    {"smoothing", Objective::kMce, 0, 0, 0.3},
};

// Loss and lse, columns coming in blocks of `width`.
std::pair<std::vector<double>, std::vector<double>> in_blocks(LossRows args, DType dtype, int64_t rows, int64_t width) {
  std::vector<double> loss(rows, -1), lse(rows, -1), label_logits(rows * args.bag_size);
  std::vector<RowSums<double>> partial(rows);
  char* logits = static_cast<char*>(args.logits);
  args.gradient = false, args.loss = loss.data(), args.lse = lse.data();
  if (!LossTest::emulated_.empty()) {  // on CUDA whole rows alone
    args.partial = nullptr;
    loss_rows(dtype)(args, 0, rows);
    return {loss, lse};
  }
  args.partial = partial.data(), args.label_logits = label_logits.data();
  for (int64_t v = 0; v < args.vocabulary; v += width) {
    args.block_start = v, args.block_columns = std::min(width, args.vocabulary - v);
    args.logits = logits + v * static_cast<int64_t>(Stored::width(dtype));
    loss_rows(dtype)(args, 0, rows);
  }
  return {loss, lse};
}

TEST_P(LossTest, LossRows) {
  for (const LossOptions& options : kLossOptions) {
    if (once() && &options - kLossOptions == 3) break;
    std::vector<int64_t> vocabularies = {1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 100, 4095, 4096, 4097, 8200};
    if (!emulated_.empty()) vocabularies = {1, 2, 7, 33, 100, 4200};  // 525 packs at least, 64 threads
    if (once()) vocabularies = {1, 33, 64, 2700};
    for (const int64_t vocabulary : vocabularies) {
      for (const int64_t bag_size : {1, 3, 9}) {
        if (bag_size != 3 && (vocabulary > 2000 || (once() && vocabulary != 33))) continue;
        SCOPED_TRACE(std::string(options.name) + ", V " + std::to_string(vocabulary));
        const int64_t rows = 5, stride = vocabulary + 5;
        Stored logits(dtype(), rows * stride);
        for (int64_t i = 0; i < rows * stride; ++i) logits.set(i, 3 * normal());
        std::vector<int64_t> labels(rows * bag_size);
        for (int64_t& y : labels) y = random() % 4 == 0 ? kIgnore : static_cast<int64_t>(random() % vocabulary);
        // Rows 1 and 2 have no labels. On CUDA rows 3 and 4 are the last ones of a cluster, and have some.
        for (int64_t i = bag_size; i < 3 * bag_size; ++i) labels[i] = kIgnore;
        const int64_t scale_stride = options.upstream ? bag_size : 0;
        std::vector<double> scale(options.upstream ? rows * bag_size : bag_size), grad_loss(rows), grad_lse(rows);
        for (double& c : scale) c = (1.0 + random() % 5) / (5.0 * bag_size);
        if (bag_size == 9) scale[4] = 0;
        if (options.objective == Objective::kMceAlt) {
          for (size_t i = 0; i < scale.size(); ++i) scale[i] = 0.4 + 0.1 * static_cast<double>(i / bag_size);
        }
        for (double& g : grad_loss) g = normal();
        for (double& g : grad_lse) g = normal();
        grad_lse[1] = 0, grad_loss[4] = 0, grad_lse[4] = 0;
        const Stored before = logits;

        std::vector<double> loss(rows, -1), lse(rows, -1), loss_only(rows, -1), lse_only(rows, -1);
        LossRows forward{};
        forward.logits = logits.bytes.data(), forward.stride = stride, forward.vocabulary = vocabulary;
        forward.labels = labels.data(), forward.bag_size = bag_size, forward.options.ignore_index = kIgnore;
        forward.label_scale = scale.data(), forward.scale_stride = scale_stride;
        forward.options.objective = options.objective;
        forward.options.logit_softcap = options.logit_softcap, forward.options.z_loss = options.z_loss;
        forward.options.label_smoothing = options.label_smoothing;
        forward.loss = loss_only.data(), forward.lse = lse_only.data();
        if (options.upstream) forward.grad_loss = grad_loss.data(), forward.grad_lse = grad_lse.data();
        loss_rows(dtype())(forward, 0, rows);
        EXPECT_EQ(logits.bytes, before.bytes) << "without a gradient the logits stay";
        const auto [loss_of_blocks, lse_of_blocks] = in_blocks(forward, dtype(), rows, 1 + random() % vocabulary);
        EXPECT_EQ(logits.bytes, before.bytes);
        LossRows both = forward;
        both.gradient = true, both.loss = loss.data(), both.lse = lse.data();
        loss_rows(dtype())(both, 0, rows);

        for (int64_t r = 0; r < rows; ++r) {
          std::vector<double> x(vocabulary);
          for (int64_t v = 0; v < vocabulary; ++v) x[v] = before.get(r * stride + v);
          const Expected wanted = expected_row(x, labels.data() + r * bag_size, both, r);
          // Logits up to 25 apart: an exponential errs by half an eps of its argument and 1 ulp, the sum by less, the
          // products that follow by half an eps each; a softcap adds 2 ulp of z, 8 eps below 5. The CUDA kernel adds a
          // row up in its accumulation type.
          const double tolerance =
              ((emulated_.empty() ? 18 : 24) + (options.logit_softcap ? 8 : 0)) * accumulation_eps();
          EXPECT_NEAR(lse[r], wanted.lse, tolerance);
          EXPECT_NEAR(loss[r], wanted.loss, tolerance * (1 + wanted.size));
          EXPECT_GE(loss[r], 0);
          EXPECT_EQ(loss_only[r], loss[r]);
          EXPECT_EQ(lse_only[r], lse[r]);
          EXPECT_NEAR(lse_of_blocks[r], wanted.lse, tolerance);
          EXPECT_NEAR(loss_of_blocks[r], wanted.loss, tolerance * (1 + wanted.size));
          for (int64_t v = 0; v < vocabulary; ++v) {
            const double rounding =
                eps(dtype()) / 2 * std::fabs(wanted.gradient[v]) + tolerance * wanted.gradient_size[v];
            // Below float16's smallest normal number the last place is 2^-24.
            EXPECT_NEAR(logits.get(r * stride + v), wanted.gradient[v], rounding + (dtype() == kFloat16 ? 3e-8 : 0))
                << "row " << r << " column " << v;
          }
          for (int64_t v = vocabulary; v < stride; ++v) {
            EXPECT_EQ(logits.get(r * stride + v), before.get(r * stride + v)) << "wrote past the row";
          }
        }
      }
    }
  }
}

TEST_P(LossTest, LossRowsExtremes) {
  const int64_t vocabulary = 70;
  for (const LossOptions& options : kLossOptions) {
    if (options.upstream || options.logit_softcap || options.z_loss) continue;  // a cap lifts -inf
    SCOPED_TRACE(options.name);
    Stored logits(dtype(), 4 * vocabulary);
    for (int64_t v = 0; v < vocabulary; ++v) {
      logits.set(v, v == 69 ? 0 : -INFINITY);                 // a masked vocabulary
      logits.set(vocabulary + v, v == 3 ? 60000 : -60000.0);  // far beyond exp's range
      logits.set(2 * vocabulary + v, v == 66 ? NAN : 1);      // must not be hidden
      logits.set(3 * vocabulary + v, NAN);                    // no label: what it is does not matter
    }
    const std::vector<int64_t> labels = {69, 3, 3, kIgnore};
    const double scale = 1;
    std::vector<double> loss(4), lse(4);
    LossRows args{};
    args.logits = logits.bytes.data(), args.stride = args.vocabulary = vocabulary;
    args.labels = labels.data(), args.bag_size = 1, args.options.ignore_index = kIgnore, args.label_scale = &scale;
    args.options.objective = options.objective, args.options.label_smoothing = options.label_smoothing;
    args.gradient = true, args.loss = loss.data(), args.lse = lse.data();
    for (const int64_t width : {1, 7, 67, 69}) {
      const std::vector<double> blocks = in_blocks(args, dtype(), 4, width).first;
      EXPECT_NEAR(blocks[0], 0, eps(kFloat64)) << width;
      EXPECT_TRUE(std::isnan(blocks[2])) << width;
      EXPECT_EQ(blocks[3], 0) << width;
      if (!options.label_smoothing) {
        EXPECT_EQ(blocks[1], 0) << width;
      }
    }
    loss_rows(dtype())(args, 0, 4);
    // 0 but for the rounding of 1 - label_smoothing.
    EXPECT_NEAR(loss[0], 0, eps(kFloat64)) << "the only column that is not masked";
    EXPECT_TRUE(std::isnan(loss[2]));
    EXPECT_EQ(loss[3], 0);
    for (int64_t v = 0; v < vocabulary; ++v) {
      EXPECT_NEAR(logits.get(v), 0, eps(kFloat64)) << v;
      EXPECT_EQ(logits.get(3 * vocabulary + v), 0) << v;
    }
    if (options.label_smoothing) continue;
    EXPECT_EQ(loss[1], 0);
    for (int64_t v = vocabulary; v < 2 * vocabulary; ++v) EXPECT_EQ(logits.get(v), 0) << v;
  }
}

// Whole rows and masks of finite size, at which a product of a logit and log2(e) is rounded by more than 1.
TEST_P(LossTest, LargeLogits) {
  const double largest = dtype() == kFloat16 ? 6e4 : 3e38;
  for (const int64_t vocabulary : {128, 4096}) {
    if (once() && vocabulary == 4096) continue;
    for (const double offset : {0.0, 1e4, 6e4, 1e8, -1e10, 1e20}) {
      for (const double mask : {0.0, -1e4, -1e9, -1e10, -1e12, -1e30, -3e38}) {
        if (std::fabs(offset) > largest || -mask > largest || (offset != 0 && mask != 0)) continue;
        SCOPED_TRACE("V " + std::to_string(vocabulary) + ", offset " + std::to_string(offset) + ", mask " +
                     std::to_string(mask));
        Stored logits(dtype(), vocabulary);
        std::vector<double> x(vocabulary);
        for (int64_t v = 0; v < vocabulary; ++v) {
          const bool masked = mask != 0 && (vocabulary == 128 ? v >= 100 : v >= 20);
          logits.set(v, offset + (masked ? mask : double(v % 7) / 2));
          x[v] = logits.get(v);
        }
        const int64_t label = 3;
        const double scale = 1, upstream = 1.0 / 3;
        double loss = 0, lse = 0;
        LossRows args{};
        args.logits = logits.bytes.data(), args.stride = args.vocabulary = vocabulary;
        args.labels = &label, args.bag_size = 1, args.options.ignore_index = kIgnore, args.label_scale = &scale;
        args.grad_loss = &upstream, args.gradient = true, args.loss = &loss, args.lse = &lse;
        loss_rows(dtype())(args, 0, 1);
        const Expected wanted = expected_row(x, &label, args, 0);
        const double tolerance = 24 * accumulation_eps();
        EXPECT_NEAR(lse, wanted.lse, tolerance * (1 + std::fabs(wanted.lse)));
        EXPECT_NEAR(loss, wanted.loss, tolerance * (1 + wanted.size));
        for (int64_t v = 0; v < vocabulary; ++v) {
          EXPECT_NEAR(logits.get(v), wanted.gradient[v],
                      eps(dtype()) / 2 * std::fabs(wanted.gradient[v]) + tolerance * wanted.gradient_size[v] +
                          (dtype() == kFloat16 ? 3e-8 : 0))
              << v;
        }
      }
    }
  }
}

TEST_P(LossTest, MaximumInEveryColumn) {
  // Differences that exp cannot bridge: with any other maximum the loss is infinite or NaN.
  const int64_t n = once() ? 34 : 130;
  Stored logits(dtype(), n * n);
  for (int64_t i = 0; i < n * n; ++i) logits.set(i, i % (n + 1) == 0 ? 32768.0 : -32768.0);
  std::vector<int64_t> labels(n);
  for (int64_t r = 0; r < n; ++r) labels[r] = r;
  const double scale = 1;
  std::vector<double> loss(n), lse(n);
  LossRows args{};
  args.logits = logits.bytes.data(), args.stride = args.vocabulary = n;
  args.labels = labels.data(), args.bag_size = 1, args.options.ignore_index = kIgnore, args.label_scale = &scale;
  args.gradient = true, args.loss = loss.data(), args.lse = lse.data();
  for (const int64_t width : {1, 33, 129}) {
    if (!emulated_.empty() && width > 1) continue;  // which has no blocks of columns
    const auto [blocks, lse_of_blocks] = in_blocks(args, dtype(), n, width);
    EXPECT_EQ(blocks, std::vector<double>(n, 0.0)) << width;
    EXPECT_EQ(lse_of_blocks, std::vector<double>(n, 32768.0)) << width;
  }
  loss_rows(dtype())(args, 0, n);
  EXPECT_EQ(loss, std::vector<double>(n, 0.0));
  EXPECT_EQ(lse, std::vector<double>(n, 32768.0));
  for (int64_t i = 0; i < n * n; ++i) EXPECT_EQ(logits.get(i), 0) << i;
}

// One row of nine logits, 0 but for column 3, with labels 2 and 3.
struct SmallRow {
  Stored logits;
  double loss = -1, lse = -1;
  std::vector<int64_t> labels = {2, 3};

  SmallRow(DType dtype, double logit, std::vector<double> scale, const double* grad_loss) : logits(dtype, 9) {
    for (int64_t v = 0; v < 9; ++v) logits.set(v, v == 3 ? logit : 0.0);
    LossRows args{};
    args.logits = logits.bytes.data(), args.stride = args.vocabulary = 9;
    args.labels = labels.data(), args.bag_size = 2, args.options.ignore_index = kIgnore,
    args.label_scale = scale.data();
    args.gradient = true, args.grad_loss = grad_loss, args.loss = &loss, args.lse = &lse;
    loss_rows(dtype)(args, 0, 1);
  }
};

TEST_P(LossTest, LabelOfWeightZeroMayBeMasked) {
  const SmallRow row(dtype(), -INFINITY, {1, 0}, nullptr);  // 0 times infinity is NaN
  EXPECT_NEAR(row.loss, std::log(8.0), 16 * accumulation_eps());
  EXPECT_EQ(row.logits.get(3), 0);
  EXPECT_NEAR(row.logits.get(2), 0.125 - 1, eps(dtype()));
}

TEST_P(LossTest, RowWithoutUpstreamGradientIsZeros) {
  const double nothing = 0;
  for (const double logit : {NAN, INFINITY}) {
    const SmallRow row(dtype(), logit, {1, 1}, &nothing);
    for (int64_t v = 0; v < 9; ++v) EXPECT_EQ(row.logits.get(v), 0) << v;
  }
}

TEST_P(LossTest, MaskedColumnsGetNoSmoothing) {
  const int64_t vocabulary = 40;
  Stored logits(dtype(), vocabulary);
  for (int64_t v = 0; v < vocabulary; ++v) logits.set(v, v % 2 ? v % 4 - 2.0 : -INFINITY);  // 10 times -1, 10 times 1
  const int64_t label = 5;                                                                  // -1
  const double scale = 1;
  double loss, lse;
  LossRows args{};
  args.logits = logits.bytes.data(), args.stride = args.vocabulary = vocabulary;
  args.labels = &label, args.bag_size = 1, args.options.ignore_index = kIgnore, args.label_scale = &scale;
  args.options.label_smoothing = 0.5, args.gradient = true, args.loss = &loss, args.lse = &lse;
  loss_rows(dtype())(args, 0, 1);
  const double total = 10 * std::exp(1.0) + 10 * std::exp(-1.0);
  EXPECT_NEAR(loss, 0.5 * (std::log(total) + 1) + 0.5 * std::log(total), 16 * accumulation_eps());
  for (int64_t v = 0; v < vocabulary; ++v) {
    const double p = v % 2 ? std::exp(v % 4 - 2.0) / total : 0.0;
    const double wanted = v == 5 ? p - 0.5 - 0.025 : v % 2 ? p - 0.025 : 0.0;
    EXPECT_NEAR(logits.get(v), wanted, eps(dtype())) << v;
  }
}

TEST_P(LossTest, SetObjectiveWithMaskedLabels) {
  const int64_t vocabulary = 9;
  const std::vector<int64_t> labels = {2, 3, 3};
  const std::vector<double> scale = {1, 1, 1};
  for (const bool both : {false, true}) {  // one of the labels masked, or both
    Stored logits(dtype(), vocabulary);
    for (int64_t v = 0; v < vocabulary; ++v) logits.set(v, v == 2 || (both && v == 3) ? -INFINITY : 0.0);
    double loss, lse;
    LossRows args{};
    args.logits = logits.bytes.data(), args.stride = args.vocabulary = vocabulary;
    args.labels = labels.data(), args.bag_size = 3, args.options.ignore_index = kIgnore,
    args.label_scale = scale.data();
    args.options.objective = Objective::kMceAlt, args.gradient = true, args.loss = &loss, args.lse = &lse;
    loss_rows(dtype())(args, 0, 1);
    const double tolerance = 16 * accumulation_eps() + eps(dtype());
    if (both) {
      EXPECT_EQ(loss, INFINITY);
      EXPECT_NEAR(logits.get(2), -0.5, tolerance) << "the pull is shared, not NaN";
      EXPECT_NEAR(logits.get(3), -0.5, tolerance);
    } else {
      EXPECT_NEAR(loss, std::log(8.0), tolerance);
      EXPECT_EQ(logits.get(2), 0);
      EXPECT_NEAR(logits.get(3), 0.125 - 1, tolerance);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Emulated, LossTest, testing::ValuesIn(emulations()));
INSTANTIATE_TEST_SUITE_P(All, LossTest, testing::Combine(testing::ValuesIn(capabilities()), all_dtypes()));

}  // namespace
}  // namespace tst::cpu
