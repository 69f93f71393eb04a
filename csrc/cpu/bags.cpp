// The integer half of the kernels: range checks and the sort behind the embedding's backward. Serial, because it
// touches 8 bytes per id where the floating-point half moves a whole embedding row.
#include <algorithm>

#include "kernels.h"

namespace tst::cpu {

int64_t find_out_of_range(const int64_t* ids, int64_t count, int64_t limit, std::optional<int64_t> ignored) {
  for (int64_t i = 0; i < count; ++i) {
    if ((ids[i] < 0 || ids[i] >= limit) && ids[i] != ignored) return i;
  }
  return -1;
}

BagsById bags_by_id(const int64_t* ids, int64_t bags, int64_t bag_size, int64_t rows, std::optional<int64_t> ignored,
                    const double* coefficients) {
  const int64_t total = bags * bag_size;
  int64_t hits = 0;
  std::vector<int64_t> cursor(rows);  // hits, then the next free place in plan.bags
  for (int64_t p = 0; p < total; ++p) {
    if (ids[p] == ignored) continue;
    ++cursor[ids[p]];
    ++hits;
  }

  BagsById plan;
  plan.bags.resize(hits);
  if (coefficients) plan.coefficients.resize(hits);
  plan.offsets.resize(rows + 1);
  plan.long_offsets.push_back(0);
  int64_t next = 0;
  for (int64_t v = 0; v < rows; ++v) {
    plan.offsets[v] = next;
    if (cursor[v] > BagsById::kPiece) {
      plan.long_rows.push_back(v);
    } else {
      const int64_t end = next + cursor[v];
      cursor[v] = next;
      next = end;
    }
  }
  plan.offsets[rows] = next;
  plan.piece_offsets.push_back(next);
  for (const int64_t v : plan.long_rows) {
    const int64_t end = next + cursor[v];
    cursor[v] = next;
    while (next < end) {
      next = std::min(next + BagsById::kPiece, end);
      plan.piece_offsets.push_back(next);
    }
    plan.long_offsets.push_back(static_cast<int64_t>(plan.piece_offsets.size()) - 1);
  }
  for (int64_t bag = 0, p = 0; bag < bags; ++bag) {
    for (int64_t i = 0; i < bag_size; ++i, ++p) {
      if (ids[p] == ignored) continue;
      const int64_t place = cursor[ids[p]]++;
      plan.bags[place] = bag;
      if (coefficients) plan.coefficients[place] = coefficients[p];
    }
  }
  return plan;
}

int64_t balanced_start(const std::vector<int64_t>& offsets, int64_t part, int64_t parts) {
  const int64_t rows = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t target = (offsets[rows] + rows) * part / parts;
  int64_t low = 0, high = rows;  // offsets[v] + v grows strictly with v
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] + middle < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace tst::cpu
