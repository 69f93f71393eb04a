// The raw CPU kernels: plain pointers, no torch header, callable from any thread.
//
// Every hot loop is compiled once per instruction set (kernels_*.cpp) from the same source, kernels_impl.h, and
// reached through a table of function pointers. A kernel works on the row range [begin, end) that its caller hands
// it, so that the caller owns the threads. No result depends on how the rows are divided.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../loss.h"

namespace tst::cpu {

enum DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kDTypes };

// out[r] = scale * sum_{k in [begin[r], end[r])} coefficients[k] * source[index[k]], accumulated in float32 (float64
// for float64) in the order of k and rounded once. An empty range writes zeros, which is what clears the rows of an
// embedding gradient.
struct GatherSum {
  const void* source;       // [*, dim]
  const int64_t* index;     // rows of source; nullptr: k itself
  const int64_t* begin;     // [rows]
  const int64_t* end;       // [rows]
  const int64_t* out_rows;  // [rows] or nullptr: row r of out
  void* out;                // [*, dim]
  int64_t dim;
  double scale;
  const double* coefficients;  // like index; nullptr: all 1
};

// One pass over a chunk of logits, by the formulas of loss.h: loss and lse, and with `gradient` the logits overwritten
// by their gradient.
struct LossRows {
  void* logits;    // [rows, vocabulary], or [rows, block_columns] of a block; row stride `stride`
  int64_t stride;  // in elements
  int64_t vocabulary;
  const int64_t* labels;  // [rows, bag_size], each in [0, vocabulary) or ignore_index
  int64_t bag_size;
  const double* label_scale;  // [bag_size], or [rows, bag_size] with scale_stride bag_size in place of 0
  int64_t scale_stride;
  LossOptions options;
  bool gradient;
  const double* grad_loss;  // [rows]; nullptr: all 1
  const double* grad_lse;   // [rows]; nullptr: all 0
  double* loss;             // [rows]
  double* lse;              // [rows]
  // Without gradient a row may come in blocks of columns, in order, in calls that each have a block's logits. The call
  // with the last block writes loss and lse.
  RowSums<double>* partial;  // [rows], RowSums{} before the first block; nullptr: whole rows
  double* label_logits;      // [rows, bag_size]: what `partial` keeps of the labels
  int64_t block_start;       // first column of the block
  int64_t block_columns;
};

// out[i] = source[i], or out[i] += source[i]: what a GEMM of bfloat16 with float32 output would do, which ATen does not
// offer on CPU.
struct Accumulate {
  const void* source;  // bfloat16
  float* out;
  bool add;
};

// out[v] = sum_r source[r, v], or out[v] += it: the gradient of the bias, in float32 (float64 for float64). Its range
// is one of columns.
struct ColumnSum {
  const void* source;  // [rows, *], row stride `stride`
  int64_t stride;      // in elements
  int64_t rows;
  void* out;
  bool add;
};

using GatherSumFn = void (*)(const GatherSum&, int64_t begin, int64_t end);
using LossRowsFn = void (*)(const LossRows&, int64_t begin, int64_t end);
using AccumulateFn = void (*)(const Accumulate&, int64_t begin, int64_t end);
using ColumnSumFn = void (*)(const ColumnSum&, int64_t begin, int64_t end);

struct Kernels {
  GatherSumFn gather_sum[kDTypes];          // source and out of the dtype
  GatherSumFn gather_sum_partial[kDTypes];  // source of the dtype, out in the accumulation type
  GatherSumFn gather_sum_finish[kDTypes];   // source in the accumulation type, out of the dtype
  LossRowsFn loss_rows[kDTypes];
  ColumnSumFn column_sum[kDTypes];
  AccumulateFn accumulate_bfloat16;
};

// Instruction sets. "default" is what the compiler's baseline offers: SSE2 on x86-64, NEON on aarch64.
std::vector<std::string> capabilities();       // those this processor runs, the best last
std::string capability();                      // the one in use
void set_capability(const std::string& name);  // std::invalid_argument names what is available
const Kernels& kernels();                      // of the capability in use

// Flat position of the first id outside [0, limit) that is not `ignored`, or -1.
int64_t find_out_of_range(const int64_t* ids, int64_t count, int64_t limit, std::optional<int64_t> ignored);

// Which bags hit which row of the embedding table: a counting sort of (id, position), stable, hence deterministic. An
// id equal to `ignored` hits nothing. Ids with more than kPiece hits are cut into pieces of kPiece, whose partial sums
// are added in order afterwards: the most frequent token of the default corpus makes 4.4 % of it, and must not be one
// thread's work.
struct BagsById {
  static constexpr int64_t kPiece = 256;  // a partial row is written and read once per 256 rows read: < 1 % more bytes
  std::vector<int64_t> bags;              // [hits] bag numbers; those of ids without pieces first, ordered by id
  std::vector<double> coefficients;       // [hits] of each hit, or empty
  std::vector<int64_t> offsets;           // [rows + 1] into bags; empty ranges for ids without hits or with pieces
  std::vector<int64_t> piece_offsets;     // [pieces + 1] into bags
  std::vector<int64_t> long_rows;         // ids cut into pieces
  std::vector<int64_t> long_offsets;      // [long_rows + 1] into the pieces
};
// coefficients: [bags, bag_size], or nullptr.
BagsById bags_by_id(const int64_t* ids, int64_t bags, int64_t bag_size, int64_t rows,
                    std::optional<int64_t> ignored = std::nullopt, const double* coefficients = nullptr);

// First row of part `part` of `parts` such that parts have equal work, where a row costs one write and one read per
// hit.
int64_t balanced_start(const std::vector<int64_t>& offsets, int64_t part, int64_t parts);

}  // namespace tst::cpu
