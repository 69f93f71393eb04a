// The raw CPU kernels but for the loss, against plain loops in double, with every instruction set that this processor
// runs.
#include <cmath>
#include <cstring>
#include <thread>

#include "kernel_fixture.h"

namespace tst::cpu {
namespace {

TEST_P(KernelTest, ColumnSum) {
  for (const int64_t columns : {1, 7, 8, 9, 511, 512, 513, 1100}) {
    for (const int64_t rows : {1, 3, 127, 128, 129, 300}) {
      if (once() && (columns != 513 || rows != 129)) continue;
      const int64_t stride = columns + 3;
      Stored source(dtype(), rows * stride), out(dtype() == kFloat64 ? kFloat64 : kFloat32, columns + 3);
      for (int64_t i = 0; i < rows * stride; ++i) source.set(i, normal());
      for (int64_t v = 0; v < columns + 3; ++v) out.set(v, 0.5);
      ColumnSum args{source.bytes.data(), stride, rows, out.bytes.data(), false};
      const int64_t middle = columns / 2;  // two ranges, as two threads would
      for (const bool add : {false, true}) {
        args.add = add;
        kernels().column_sum[dtype()](args, 0, middle);
        kernels().column_sum[dtype()](args, middle, columns);
      }
      for (int64_t v = 0; v < columns + 3; ++v) {
        double sum = 0, size = 0;
        for (int64_t r = 0; r < rows && v < columns; ++r) {
          sum += source.get(r * stride + v);
          size += std::fabs(source.get(r * stride + v));
        }
        // Twice, for `add`. Rounding: half an eps of the partial sums, whose size is that of sqrt(rows) terms.
        const double wanted = v < columns ? 2 * sum : 0.5;
        EXPECT_NEAR(out.get(v), wanted, 4 * accumulation_eps() * (size + 1)) << columns << " x " << rows << ": " << v;
      }
    }
  }
}

TEST_P(KernelTest, GatherSumForwardAndPieces) {
  for (const int64_t dim : {1, 3, 8, 15, 16, 17, 63, 64, 65, 200}) {
    const int64_t table = 11, rows = 5;
    Stored source(dtype(), table * dim), out(dtype(), 2 * rows * dim);
    for (int64_t i = 0; i < table * dim; ++i) source.set(i, normal());
    const std::vector<int64_t> index = {3, 3, 0, 10, 5, 6, 7, 1, 2, 4}, begin = {0, 2, 2, 9, 3}, end = {2, 2, 9, 10, 7};
    const std::vector<int64_t> out_rows = {1, 3, 5, 7, 9};
    const GatherSum args{source.bytes.data(), index.data(), begin.data(), end.data(), out_rows.data(),
                         out.bytes.data(),    dim,          0.25,         nullptr};
    const Stored poisoned = out;
    kernels().gather_sum[dtype()](args, 0, rows);
    Stored partial(dtype() == kFloat64 ? kFloat64 : kFloat32, rows * dim), joined(dtype(), rows * dim);
    GatherSum cut = args;
    cut.out = partial.bytes.data(), cut.out_rows = nullptr, cut.scale = 1;
    kernels().gather_sum_partial[dtype()](cut, 0, rows);
    std::vector<int64_t> each(rows + 1);
    for (int64_t r = 0; r <= rows; ++r) each[r] = r;
    const GatherSum join{partial.bytes.data(), nullptr, each.data(), each.data() + 1, nullptr,
                         joined.bytes.data(),  dim,     0.25,        nullptr};
    kernels().gather_sum_finish[dtype()](join, 0, rows);
    std::vector<double> coefficients;
    for (size_t k = 0; k < index.size(); ++k) coefficients.push_back(k == 1 ? 0.0 : normal());
    Stored weighted(dtype(), rows * dim);
    GatherSum with = args;
    with.out = weighted.bytes.data(), with.out_rows = nullptr, with.coefficients = coefficients.data();
    kernels().gather_sum[dtype()](with, 0, rows);

    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < dim; ++c) {
        double sum = 0, size = 0, weighted_sum = 0, weighted_size = 0;
        for (int64_t k = begin[r]; k < end[r]; ++k) {
          const double value = source.get(index[k] * dim + c);
          sum += value, size += std::fabs(value);
          weighted_sum += coefficients[k] * value, weighted_size += std::fabs(coefficients[k] * value);
        }
        EXPECT_NEAR(weighted.get(r * dim + c), weighted_sum / 4,
                    8 * accumulation_eps() * weighted_size + eps(dtype()) / 2 * std::fabs(weighted_sum) / 4 + 3e-8);
        const double tolerance = 8 * accumulation_eps() * size + eps(dtype()) / 2 * std::fabs(sum) / 4 + 1e-12;
        EXPECT_NEAR(out.get(out_rows[r] * dim + c), sum / 4, tolerance + (dtype() == kFloat16 ? 3e-8 : 0));
        EXPECT_EQ(joined.get(r * dim + c), out.get(out_rows[r] * dim + c));
        EXPECT_NEAR(partial.get(r * dim + c), sum, 8 * accumulation_eps() * size + 1e-300);
        if (begin[r] == end[r]) {
          EXPECT_EQ(out.get(out_rows[r] * dim + c), 0) << "no hit: zeros";
        }
        EXPECT_EQ(std::memcmp(out.bytes.data() + 2 * r * dim * Stored::width(dtype()),
                              poisoned.bytes.data() + 2 * r * dim * Stored::width(dtype()), dim),
                  0)
            << "touched a row that is not its own";
      }
    }
  }
}

TEST_P(KernelTest, Accumulate) {
  if (dtype() != kBFloat16) return;
  const int64_t count = 77;
  Stored source(kBFloat16, count), out(kFloat32, count);
  for (int64_t i = 0; i < count; ++i) source.set(i, normal());
  float* data = reinterpret_cast<float*>(out.bytes.data());
  kernels().accumulate_bfloat16({source.bytes.data(), data, false}, 0, count);
  for (int64_t i = 0; i < count; ++i) EXPECT_EQ(out.get(i), source.get(i));
  kernels().accumulate_bfloat16({source.bytes.data(), data, true}, 3, 70);
  for (int64_t i = 0; i < count; ++i) EXPECT_EQ(out.get(i), (i >= 3 && i < 70 ? 2 : 1) * source.get(i)) << i;
}

// One row per thread: under ThreadSanitizer this shows that rows share nothing.
TEST_P(KernelTest, RowsAreIndependent) {
  const int64_t rows = 8, vocabulary = 50, bag_size = 4;
  Stored logits(dtype(), rows * vocabulary);
  for (int64_t i = 0; i < rows * vocabulary; ++i) logits.set(i, normal());
  Stored serial = logits;
  const std::vector<int64_t> labels(rows * bag_size, 7);
  const std::vector<double> scale(bag_size, 0.25);
  std::vector<double> loss(rows), lse(rows), loss2(rows), lse2(rows);
  LossRows args{};
  args.logits = logits.bytes.data(), args.stride = args.vocabulary = vocabulary;
  args.labels = labels.data(), args.bag_size = bag_size, args.options.ignore_index = kIgnore;
  args.label_scale = scale.data(), args.gradient = true, args.loss = loss.data(), args.lse = lse.data();
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < rows; ++r) threads.emplace_back([&, r] { kernels().loss_rows[dtype()](args, r, r + 1); });
  for (std::thread& t : threads) t.join();
  args.logits = serial.bytes.data(), args.loss = loss2.data(), args.lse = lse2.data();
  kernels().loss_rows[dtype()](args, 0, rows);
  EXPECT_EQ(logits.bytes, serial.bytes);
  EXPECT_EQ(loss, loss2);
}

INSTANTIATE_TEST_SUITE_P(All, KernelTest, testing::Combine(testing::ValuesIn(capabilities()), all_dtypes()));

// All 65536 patterns to float32 and back, and every rounding decision of a float32 on its way to 16 bits.
class ConversionTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_capability(GetParam()); }
};

TEST_P(ConversionTest, EveryPattern) {
  for (const DType dtype : {kBFloat16, kFloat16}) {
    Stored source(dtype, 65536);
    std::vector<float> wide(65536);
    for (int i = 0; i < 65536; ++i) source.raw<uint16_t>(i, static_cast<uint16_t>(i));
    const int64_t begin = 0, end = 1;
    kernels().gather_sum_partial[dtype](
        {source.bytes.data(), nullptr, &begin, &end, nullptr, wide.data(), 65536, 1.0, nullptr}, 0, 1);
    for (int i = 0; i < 65536; ++i) {
      const double expected = source.get(i);
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(wide[i])) << i;
      } else {
        EXPECT_EQ(wide[i], expected) << i;
      }
    }
  }
}

TEST_P(ConversionTest, EveryRounding) {
  for (const DType dtype : {kBFloat16, kFloat16}) {
    std::vector<float> source;
    for (int i = 0; i < 65536; ++i) {  // each value, the midpoint above it, and their float32 neighbours
      const auto at = [&](int pattern) {
        return dtype == kBFloat16 ? from_bf16(static_cast<uint16_t>(pattern))
                                  : from_f16(static_cast<uint16_t>(pattern));
      };
      const float value = at(i), next = at(i == 65535 ? i : i + 1);
      const float middle = static_cast<float>((double(value) + double(next)) / 2);
      for (const float x : {value, middle}) {
        source.insert(source.end(), {x, std::nextafter(x, INFINITY), std::nextafter(x, -INFINITY)});
      }
    }
    // What lies between float16's largest number and infinity, and NaNs whose every bit is set.
    for (const float x : {std::nextafter(65520.0f, 0.0f), 65520.0f, 65535.0f, 65536.0f, 1e5f, 131071.0f}) {
      source.insert(source.end(), {x, -x});
    }
    for (const uint32_t bits : {0x7fffffffu, 0xffffffffu}) {
      source.emplace_back();
      std::memcpy(&source.back(), &bits, 4);
    }
    Stored out(dtype, source.size());
    std::vector<int64_t> begin = {0}, end = {1};
    const GatherSum args{source.data(),
                         nullptr,
                         begin.data(),
                         end.data(),
                         nullptr,
                         out.bytes.data(),
                         static_cast<int64_t>(source.size()),
                         1.0,
                         nullptr};
    kernels().gather_sum_finish[dtype](args, 0, 1);
    for (size_t i = 0; i < source.size(); ++i) {
      const uint16_t expected = dtype == kBFloat16 ? to_bf16(source[i]) : to_f16(source[i]);
      if (std::isnan(source[i])) {
        EXPECT_TRUE(std::isnan(out.get(i))) << source[i];
      } else {
        // 0 + -0 is +0 in the sum; every other sign is kept.
        EXPECT_EQ(out.raw<uint16_t>(i), source[i] == 0 ? 0 : expected) << source[i];
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, ConversionTest, testing::ValuesIn(capabilities()));

TEST(Capability, UnknownNameIsRefused) {
  const std::string before = capability();
  EXPECT_THROW(set_capability("avx9"), std::invalid_argument);
  EXPECT_EQ(capability(), before);
}

}  // namespace
}  // namespace tst::cpu
