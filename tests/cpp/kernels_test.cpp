// The raw CPU kernels against plain loops in double, with every instruction set that this processor runs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "cpu/kernels.h"

namespace tst::cpu {
namespace {

constexpr int64_t kIgnore = -100;

// Storage formats as the tests see them: bit patterns converted one at a time, by rules written independently of the
// kernels' (round half to even by remainder).
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fc0;
  const uint32_t low = bits & 0xffff, high = bits >> 16;
  return static_cast<uint16_t>(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

float from_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  }
  return static_cast<float>(bits & 0x8000 ? -value : value);
}

uint16_t to_f16(float value) {  // the nearest of all finite halves, ties to the even pattern
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  int low = 0, high = 0x7bff;  // finite halves are ordered as their patterns
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (from_f16(static_cast<uint16_t>(middle)) <= magnitude)
      low = middle;
    else
      high = middle - 1;
  }
  const double below = magnitude - from_f16(low);
  const double above = (low == 0x7bff ? 65536.0 : from_f16(low + 1)) - magnitude;
  return sign | static_cast<uint16_t>(low + (above < below || (above == below && (low & 1))));
}

struct Stored {  // a buffer in one of the dtypes, read and written as double
  DType dtype;
  std::vector<unsigned char> bytes;

  static size_t width(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
  Stored(DType type, size_t count) : dtype(type), bytes(count * width(type), 0xcd) {}  // poisoned

  template <typename T>
  T raw(size_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <typename T>
  void raw(size_t i, T value) {
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
  double get(size_t i) const {
    switch (dtype) {
      case kFloat32:
        return raw<float>(i);
      case kBFloat16:
        return from_bf16(raw<uint16_t>(i));
      case kFloat16:
        return from_f16(raw<uint16_t>(i));
      default:
        return raw<double>(i);
    }
  }
  void set(size_t i, double value) {
    switch (dtype) {
      case kFloat32:
        return raw<float>(i, static_cast<float>(value));
      case kBFloat16:
        return raw<uint16_t>(i, to_bf16(static_cast<float>(value)));
      case kFloat16:
        return raw<uint16_t>(i, to_f16(static_cast<float>(value)));
      default:
        return raw<double>(i, value);
    }
  }
};

double eps(DType dtype) {
  switch (dtype) {
    case kFloat32:
      return std::ldexp(1, -23);
    case kBFloat16:
      return std::ldexp(1, -7);
    case kFloat16:
      return std::ldexp(1, -10);
    default:
      return std::ldexp(1, -52);
  }
}

class KernelTest : public testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  void SetUp() override { set_capability(std::get<0>(GetParam())); }
  bool has_loss() const { return dtype() != kFloat16; }  // which the op computes in float32
  DType dtype() const { return std::get<1>(GetParam()); }
  double accumulation_eps() const { return eps(dtype() == kFloat64 ? kFloat64 : kFloat32); }
  std::mt19937_64 random{7};
  double normal() { return std::normal_distribution<double>()(random); }
};

TEST_P(KernelTest, LossRows) {
  if (!has_loss()) return;
  for (const int64_t vocabulary : {1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 100, 4095, 4096, 4097, 8200}) {
    for (const int64_t bag_size : {1, 3, 9}) {
      const int64_t rows = 4, stride = vocabulary + 5;
      Stored logits(dtype(), rows * stride);
      for (int64_t i = 0; i < rows * stride; ++i) logits.set(i, 3 * normal());
      std::vector<int64_t> labels(rows * bag_size);
      for (int64_t& y : labels) y = random() % 4 == 0 ? kIgnore : static_cast<int64_t>(random() % vocabulary);
      for (int64_t i = 0; i < bag_size; ++i) labels[2 * bag_size + i] = kIgnore;
      std::vector<double> scale(bag_size);
      for (double& c : scale) c = (1.0 + random() % 5) / (5.0 * bag_size);
      const Stored before = logits;

      std::vector<double> loss(rows, -1), lse(rows, -1), loss_only(rows, -1), lse_only(rows, -1);
      const LossRows forward{logits.bytes.data(), stride, vocabulary,       labels.data(),  bag_size, kIgnore,
                             scale.data(),        false,  loss_only.data(), lse_only.data()};
      kernels().loss_rows[dtype()](forward, 0, rows);
      EXPECT_EQ(logits.bytes, before.bytes) << "without a gradient the logits stay";
      LossRows both = forward;
      both.gradient = true, both.loss = loss.data(), both.lse = lse.data();
      kernels().loss_rows[dtype()](both, 0, rows);

      for (int64_t r = 0; r < rows; ++r) {
        long double sum = 0;  // a plain sum of thousands of doubles would err more than what it judges
        double m = -INFINITY, expected = 0, total = 0;
        for (int64_t v = 0; v < vocabulary; ++v) m = std::max(m, before.get(r * stride + v));
        for (int64_t v = 0; v < vocabulary; ++v) sum += std::exp((long double)before.get(r * stride + v) - m);
        std::vector<double> gradient(vocabulary);
        for (int64_t i = 0; i < bag_size; ++i) {
          const int64_t y = labels[r * bag_size + i];
          if (y == kIgnore) continue;
          expected += scale[i] * (m + std::log(sum) - before.get(r * stride + y));
          total += scale[i];
          gradient[y] -= scale[i];
        }
        // Logits up to 25 apart: an exponential errs by half an eps of its argument and 1 ulp, the sum by less.
        const double tolerance = 16 * accumulation_eps();
        EXPECT_NEAR(lse[r], double(m + std::log(sum)), tolerance) << "V " << vocabulary;
        EXPECT_NEAR(loss[r], expected, tolerance * (1 + expected));
        EXPECT_EQ(loss_only[r], loss[r]);
        EXPECT_EQ(lse_only[r], lse[r]);
        for (int64_t v = 0; v < vocabulary; ++v) {
          const double p = std::exp((long double)before.get(r * stride + v) - m) / sum;
          const double wanted = gradient[v] + total * p, got = logits.get(r * stride + v);
          const double rounding = eps(dtype()) / 2 * std::fabs(wanted) + tolerance * (total * p - gradient[v] / 16);
          EXPECT_NEAR(got, wanted, rounding) << "V " << vocabulary << " row " << r << " column " << v;
        }
        for (int64_t v = vocabulary; v < stride; ++v) {
          EXPECT_EQ(logits.get(r * stride + v), before.get(r * stride + v)) << "wrote past the row";
        }
      }
    }
  }
}

TEST_P(KernelTest, LossRowsExtremes) {
  if (!has_loss()) return;
  const int64_t vocabulary = 70;
  Stored logits(dtype(), 3 * vocabulary);
  for (int64_t v = 0; v < vocabulary; ++v) {
    logits.set(v, v == 69 ? 0 : -INFINITY);                 // a masked vocabulary
    logits.set(vocabulary + v, v == 3 ? 60000 : -60000.0);  // far beyond exp's range
    logits.set(2 * vocabulary + v, v == 66 ? NAN : 1);      // must not be hidden
  }
  const std::vector<int64_t> labels = {69, 3, 3};
  const double scale = 1;
  std::vector<double> loss(3), lse(3);
  const LossRows args{logits.bytes.data(), vocabulary, vocabulary, labels.data(), 1, kIgnore, &scale, true,
                      loss.data(),         lse.data()};
  kernels().loss_rows[dtype()](args, 0, 3);
  EXPECT_EQ(loss[0], 0);
  EXPECT_EQ(loss[1], 0);
  EXPECT_TRUE(std::isnan(loss[2]));
  for (int64_t v = 0; v < 2 * vocabulary; ++v) EXPECT_EQ(logits.get(v), 0) << v;
}

TEST_P(KernelTest, GatherSumForwardAndPieces) {
  for (const int64_t dim : {1, 3, 8, 15, 16, 17, 63, 64, 65, 200}) {
    const int64_t table = 11, rows = 5;
    Stored source(dtype(), table * dim), out(dtype(), 2 * rows * dim);
    for (int64_t i = 0; i < table * dim; ++i) source.set(i, normal());
    const std::vector<int64_t> index = {3, 3, 0, 10, 5, 6, 7, 1, 2, 4}, begin = {0, 2, 2, 9, 3}, end = {2, 2, 9, 10, 7};
    const std::vector<int64_t> out_rows = {1, 3, 5, 7, 9};
    const GatherSum args{source.bytes.data(), index.data(),     begin.data(), end.data(),
                         out_rows.data(),     out.bytes.data(), dim,          0.25};
    const Stored poisoned = out;
    kernels().gather_sum[dtype()](args, 0, rows);
    Stored partial(dtype() == kFloat64 ? kFloat64 : kFloat32, rows * dim), joined(dtype(), rows * dim);
    GatherSum cut = args;
    cut.out = partial.bytes.data(), cut.out_rows = nullptr, cut.scale = 1;
    kernels().gather_sum_partial[dtype()](cut, 0, rows);
    std::vector<int64_t> each(rows + 1);
    for (int64_t r = 0; r <= rows; ++r) each[r] = r;
    const GatherSum join{partial.bytes.data(), nullptr, each.data(), each.data() + 1, nullptr,
                         joined.bytes.data(),  dim,     0.25};
    kernels().gather_sum_finish[dtype()](join, 0, rows);

    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < dim; ++c) {
        double sum = 0, size = 0;
        for (int64_t k = begin[r]; k < end[r]; ++k) {
          sum += source.get(index[k] * dim + c);
          size += std::fabs(source.get(index[k] * dim + c));
        }
        const double tolerance = 8 * accumulation_eps() * size + eps(dtype()) / 2 * std::fabs(sum) / 4 + 1e-12;
        EXPECT_NEAR(out.get(out_rows[r] * dim + c), sum / 4, tolerance + (dtype() == kFloat16 ? 3e-8 : 0));
        EXPECT_EQ(joined.get(r * dim + c), out.get(out_rows[r] * dim + c));
        EXPECT_NEAR(partial.get(r * dim + c), sum, 8 * accumulation_eps() * size + 1e-300);
        if (begin[r] == end[r]) EXPECT_EQ(out.get(out_rows[r] * dim + c), 0) << "no hit: zeros";
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
  if (!has_loss()) return;
  const int64_t rows = 8, vocabulary = 50, bag_size = 4;
  Stored logits(dtype(), rows * vocabulary);
  for (int64_t i = 0; i < rows * vocabulary; ++i) logits.set(i, normal());
  Stored serial = logits;
  const std::vector<int64_t> labels(rows * bag_size, 7);
  const std::vector<double> scale(bag_size, 0.25);
  std::vector<double> loss(rows), lse(rows), loss2(rows), lse2(rows);
  LossRows args{logits.bytes.data(), vocabulary, vocabulary,  labels.data(), bag_size, kIgnore,
                scale.data(),        true,       loss.data(), lse.data()};
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < rows; ++r) threads.emplace_back([&, r] { kernels().loss_rows[dtype()](args, r, r + 1); });
  for (std::thread& t : threads) t.join();
  args.logits = serial.bytes.data(), args.loss = loss2.data(), args.lse = lse2.data();
  kernels().loss_rows[dtype()](args, 0, rows);
  EXPECT_EQ(logits.bytes, serial.bytes);
  EXPECT_EQ(loss, loss2);
}

INSTANTIATE_TEST_SUITE_P(All, KernelTest,
                         testing::Combine(testing::ValuesIn(capabilities()),
                                          testing::Values(kFloat32, kBFloat16, kFloat16, kFloat64)));

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
    kernels().gather_sum_partial[dtype]({source.bytes.data(), nullptr, &begin, &end, nullptr, wide.data(), 65536, 1.0},
                                        0, 1);
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
    Stored out(dtype, source.size());
    std::vector<int64_t> begin = {0}, end = {1};
    const GatherSum args{source.data(),
                         nullptr,
                         begin.data(),
                         end.data(),
                         nullptr,
                         out.bytes.data(),
                         static_cast<int64_t>(source.size()),
                         1.0};
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

TEST(BagsById, SortsStablyAndCutsLongRows) {
  const int64_t bags = 400, bag_size = 3, rows = 9;
  std::mt19937_64 random(3);
  std::vector<int64_t> ids(bags * bag_size);
  for (size_t p = 0; p < ids.size(); ++p) ids[p] = p % 3 == 0 ? 4 : static_cast<int64_t>(random() % (rows - 1));
  for (int i = 0; i < 256; ++i) ids[3 * i + 1] = 6;
  const BagsById plan = bags_by_id(ids.data(), bags, bag_size, rows);

  std::vector<std::vector<int64_t>> expected(rows), got(rows);
  for (int64_t p = 0; p < bags * bag_size; ++p) expected[ids[p]].push_back(p / bag_size);
  for (int64_t v = 0; v < rows; ++v) {
    got[v].assign(plan.bags.begin() + plan.offsets[v], plan.bags.begin() + plan.offsets[v + 1]);
    EXPECT_LE(static_cast<int64_t>(got[v].size()), BagsById::kPiece);
  }
  for (size_t k = 0; k < plan.long_rows.size(); ++k) {
    for (int64_t piece = plan.long_offsets[k]; piece < plan.long_offsets[k + 1]; ++piece) {
      const int64_t first = plan.piece_offsets[piece], last = plan.piece_offsets[piece + 1];
      EXPECT_LE(last - first, BagsById::kPiece);
      EXPECT_GT(last, first);
      std::vector<int64_t>& row = got[plan.long_rows[k]];
      row.insert(row.end(), plan.bags.begin() + first, plan.bags.begin() + last);
    }
  }
  EXPECT_EQ(got, expected);
  EXPECT_EQ(plan.long_rows, (std::vector<int64_t>{4, 6}));
  EXPECT_TRUE(expected[8].empty());
}

TEST(BalancedStart, CoversEveryRowOnceAndEvenly) {
  std::vector<int64_t> offsets = {0};
  for (int v = 0; v < 1000; ++v) offsets.push_back(offsets.back() + (v < 10 ? 100 : v % 2));
  for (const int64_t parts : {1, 2, 3, 7, 64}) {
    EXPECT_EQ(balanced_start(offsets, 0, parts), 0);
    EXPECT_EQ(balanced_start(offsets, parts, parts), 1000);
    const int64_t work = offsets.back() + 1000;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = balanced_start(offsets, part, parts), last = balanced_start(offsets, part + 1, parts);
      ASSERT_LE(first, last);
      EXPECT_LE((offsets[last] - offsets[first]) + (last - first), work / parts + 102) << "one row more than its share";
    }
  }
  EXPECT_EQ(balanced_start({0}, 1, 2), 0);  // no rows at all
}

TEST(FindOutOfRange, NamesTheFirst) {
  const std::vector<int64_t> ids = {0, 9, kIgnore, -1, 10};
  EXPECT_EQ(find_out_of_range(ids.data(), 3, 10, kIgnore), -1);
  EXPECT_EQ(find_out_of_range(ids.data(), 5, 10, kIgnore), 3);
  EXPECT_EQ(find_out_of_range(ids.data(), 5, 9, kIgnore), 1);
  EXPECT_EQ(find_out_of_range(ids.data(), 5, 10, 0), 2);
  EXPECT_EQ(find_out_of_range(ids.data(), 0, 0, kIgnore), -1);
}

TEST(Capability, UnknownNameIsRefused) {
  const std::string before = capability();
  EXPECT_THROW(set_capability("avx9"), std::invalid_argument);
  EXPECT_EQ(capability(), before);
}

}  // namespace
}  // namespace tst::cpu
