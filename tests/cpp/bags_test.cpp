// The integer half of the kernels: the sort behind the embedding's backward, its division among threads, range checks.
#include <gtest/gtest.h>

#include <random>

#include "cpu/kernels.h"

namespace tst::cpu {
namespace {

constexpr int64_t kIgnore = -100;

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

TEST(BagsById, SkipsIgnoredIdsAndSortsCoefficients) {
  const std::vector<int64_t> ids = {2, kIgnore, 0, 2, kIgnore, kIgnore, 1, 2};
  std::vector<double> coefficients = {0.5, 9, 1, 2, 9, 9, 3, 4};
  const BagsById plan = bags_by_id(ids.data(), 4, 2, 3, kIgnore, coefficients.data());
  EXPECT_EQ(plan.offsets, (std::vector<int64_t>{0, 1, 2, 5}));
  EXPECT_EQ(plan.bags, (std::vector<int64_t>{1, 3, 0, 1, 3}));
  EXPECT_EQ(plan.coefficients, (std::vector<double>{1, 3, 0.5, 2, 4}));

  std::vector<int64_t> many(600, 1);  // cut into pieces: the coefficients go with their bags
  many[5] = kIgnore;
  std::vector<double> each(600);
  for (size_t p = 0; p < each.size(); ++p) each[p] = double(p);
  const BagsById cut = bags_by_id(many.data(), 600, 1, 2, kIgnore, each.data());
  EXPECT_EQ(cut.piece_offsets, (std::vector<int64_t>{0, 256, 512, 599}));
  for (size_t k = 0; k < cut.bags.size(); ++k) EXPECT_EQ(cut.coefficients[k], double(cut.bags[k]));
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
  EXPECT_EQ(find_out_of_range(ids.data(), 5, 10, std::nullopt), 2);
  EXPECT_EQ(find_out_of_range(ids.data(), 0, 0, kIgnore), -1);
}

}  // namespace
}  // namespace tst::cpu
