// How a row is cut, over sizes of vocabulary and bag, dtypes and devices.
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "cuda/shape.h"

namespace tst::cuda {
namespace {

struct Device {
  const char* name;
  DeviceFacts facts;
};
constexpr Device kDevices[] = {
    {"sm_80", {false, 163 << 10}}, {"sm_89", {false, 99 << 10}}, {"sm_90", {true, 227 << 10}},
    {"sm_100", {true, 227 << 10}}, {"sm_120", {true, 99 << 10}}, {"sm_90, code for sm_80", {false, 227 << 10}},
};

// Where decisions change: slices of 4 KiB, 40 KiB, 64 KiB, 80 KiB and of all that a device has, in 1 to 8 blocks.
template <typename T>
std::set<int64_t> vocabularies() {
  std::set<int64_t> found{1, 2, 3, 7, 8, 9, 1000, 50257, 128256, 151936, 300'000, 600'000, 1'000'003, (1 << 30) - 1};
  for (const int64_t kib : {4, 40, 64, 80, 98, 99, 162, 163, 226, 227}) {
    for (const int64_t blocks : {1, 2, 4, 8}) {
      const int64_t columns = kib * 1024 / static_cast<int64_t>(sizeof(T)) * blocks;
      for (int64_t off = -2 * kPack<T>; off <= 2 * kPack<T>; ++off) found.insert(columns + off);
    }
  }
  std::mt19937_64 random(3);
  for (int i = 0; i < 200; ++i) found.insert(1 + static_cast<int64_t>(random() % (1 << (4 + random() % 27))));
  return found;
}

template <typename T>
class CudaShapeTest : public testing::Test {};
using Types = testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(CudaShapeTest, Types);

TYPED_TEST(CudaShapeTest, Fits) {
  using T = TypeParam;
  alignas(16) T row[kPack<T>];
  for (const Device& device : kDevices) {
    for (const int64_t vocabulary : vocabularies<T>()) {
      for (const int64_t bag_size : {1, 6, 16, 512, 1500}) {
        for (const bool gradient : {false, true}) {
          SCOPED_TRACE(std::string(device.name) + ", V " + std::to_string(vocabulary) + ", s " +
                       std::to_string(bag_size) + (gradient ? ", gradient" : ""));
          const Shape shape = shape_of<T>(vocabulary, bag_size, gradient, device.facts);
          ASSERT_TRUE(shape.blocks == 1 || shape.blocks == 2 || shape.blocks == 4 || shape.blocks == 8);
          ASSERT_TRUE(shape.blocks == 1 || device.facts.clusters);
          ASSERT_TRUE(shape.threads > 0 && shape.threads % kWarp == 0 && shape.threads <= kMaxThreads);
          ASSERT_GE(shape.cache_bytes, 0);
          ASSERT_EQ(shape.shared_bytes, loss_rows_memory<T>(bag_size) + shape.cache_bytes);
          ASSERT_LE(shape.shared_bytes, device.facts.shared_memory);
          ASSERT_EQ(shape.pass == Pass::kLoss, !gradient);
          ASSERT_EQ(shape.pass == Pass::kCachedGradient, shape.cache_bytes > 0);
          ASSERT_EQ(shape.cache_bytes % 16, 0) << "the targets come after it";
          for (int head = 0; head < kPack<T> && shape.cache_bytes; ++head) {
            const RowPacks<T> packs(row + head, static_cast<int>(vocabulary));
            for (int rank = 0; rank < shape.blocks; ++rank) {
              const Slice slice(packs, shape.blocks, rank);
              ASSERT_LE((slice.last - slice.first) * 16, shape.cache_bytes) << "head " << head << ", block " << rank;
            }
          }
        }
      }
    }
  }
}

// Thresholds as a page of documentation would state them.
TYPED_TEST(CudaShapeTest, ReadsARowOnceWhereItCan) {
  using T = TypeParam;
  const auto cached = [](int64_t vocabulary, const DeviceFacts& facts) {
    return shape_of<T>(vocabulary, 6, true, facts).cache_bytes > 0;
  };
  for (const Device& device : kDevices) {
    const int64_t bytes = device.facts.clusters ? 8 * device.facts.shared_memory : 80 << 10;
    const int64_t columns = bytes / static_cast<int64_t>(sizeof(T));
    EXPECT_TRUE(cached(columns * 97 / 100, device.facts)) << device.name;  // the rest: sums, six targets
    EXPECT_FALSE(cached(columns, device.facts)) << device.name;
  }
}

TYPED_TEST(CudaShapeTest, LongSlices) {  // of more than 64 KiB: 14 warps of columns, and on sm_90 still cached
  using T = TypeParam;
  const int64_t columns = (1200 << 10) / static_cast<int64_t>(sizeof(T));  // 300,000 of float32, 600,000 of bfloat16
  const Shape shape = shape_of<T>(columns, 6, true, {true, 227 << 10});
  EXPECT_EQ(shape.blocks, 8);
  EXPECT_EQ(shape.threads, 15 * kWarp);
  EXPECT_NEAR(shape.cache_bytes, 150 << 10, 16);
  EXPECT_EQ(shape_of<T>(columns, 6, true, {true, 99 << 10}).cache_bytes, 0) << "sm_120 reads them twice";
}

// The registers of a multiprocessor suffice for as many blocks as its shared memory has room for.
TYPED_TEST(CudaShapeTest, RegistersDoNotLimitWhatSharedMemoryAllows) {
  using T = TypeParam;
  for (const Device& device : kDevices) {
    for (const int64_t vocabulary : vocabularies<T>()) {
      const Shape shape = shape_of<T>(vocabulary, 6, true, device.facts);
      if (shape.pass != Pass::kCachedGradient || shape.threads == 3 * kWarp) continue;
      const int64_t room = (device.facts.shared_memory + (1 << 10)) / (shape.shared_bytes + (1 << 10));
      ASSERT_LE(room * shape.threads * 64, 1 << 16) << device.name << ", V " << vocabulary;
    }
  }
}

TYPED_TEST(CudaShapeTest, RefusesBagsThatDoNotFit) {
  using T = TypeParam;
  for (const Device& device : kDevices) {
    const int64_t most =
        (device.facts.shared_memory - loss_rows_memory<T>(0)) / (2 * static_cast<int64_t>(sizeof(Target<Acc<T>>)));
    EXPECT_LE(shape_of<T>(100, most, true, device.facts).shared_bytes, device.facts.shared_memory) << device.name;
    for (const int64_t bag_size : {most + 1, int64_t(1) << 27, int64_t(1) << 31, int64_t(1) << 60}) {
      try {
        shape_of<T>(100, bag_size, false, device.facts);
        ADD_FAILURE() << device.name << ": " << bag_size << " labels";
      } catch (const std::runtime_error& error) {
        EXPECT_EQ(error.what(), "labels: expected bags of at most " + std::to_string(most) +
                                    " labels on this device, got " + std::to_string(bag_size));
      }
    }
  }
}

}  // namespace
}  // namespace tst::cuda
