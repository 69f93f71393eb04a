"""Mutation testing: breaks one line at a time and demands that a test notices.

    python tests/mutation.py [--only NAME ...] [--table]

The raw kernels are judged by the C++ tests (needs CMake and GoogleTest), launches of the CUDA kernels by
tests/test_cuda_host.py, what stands between the kernels and the user by pytest (needs the installed development
environment). All of it happens in a copy of the working tree: an hour on two cores. The exit status is 1 if a mutant
survives, does not apply or does not compile. A mutant that survives is a missing test, or equivalent to what it
replaces: then it has no place here.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
JOBS = os.environ.get("JOBS", "2")  # at a time, in a build
CPP_SECONDS, PYTEST_SECONDS = 300, 900  # a loop that a mutant made endless ends here


class Mutant(NamedTuple):
    name: str
    old: str  # once in its file
    new: str
    breaks: str


class Outcome(NamedTuple):
    state: str  # "killed", "survived" or "does not compile"
    failing: str = ""  # the first test that fails
    output: str = ""


# fmt: off
CPP: dict[str, list[Mutant]] = {
    "csrc/cpu/kernels_impl.h": [
        # Storage formats.
        Mutant("bf16-truncated", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16;", "bits >> 16;", "bfloat16 truncated"),
        Mutant("bf16-ties", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16;", "(bits + 0x8000) >> 16;",
               "bfloat16 ties away from even"),
        Mutant("bf16-nan", "(bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded", "rounded",
               "a NaN with a full significand rounds to -0"),
        Mutant("f16-ties", "0xfff + ((magnitude >> 13) & 1)", "0x1000", "float16 ties away from even"),
        Mutant("f16-subnormal", "magnitude < 0x38800000", "magnitude < 0x38000000",
               "largest subnormal halves rounded as normal ones"),
        Mutant("f16-overflow", "magnitude >= 0x47800000", "magnitude >= 0x48000000", "65536 to 131071 become NaN"),
        Mutant("f16-infinity", "magnitude >= 0x0f800000", "magnitude > 0x0f800000", "half's infinity widens to 65536"),
        # The end of a row.
        Mutant("load-fill", "lane = static_cast<int>(count); lane < kLanes; ++lane) value",
               "lane = static_cast<int>(count) + 1; lane < kLanes; ++lane) value", "lane past the end not filled"),
        Mutant("store-tail", "std::memcpy(to, padded, count * sizeof(T));",
               "std::memcpy(to, padded, (count - 1) * sizeof(T));", "last lane not stored"),
        # exp and tanh.
        Mutant("exp-constant", "5.0000001201e-1f", "5.001e-1f", "polynomial of exp off by 1e-4"),
        Mutant("exp-ln2", "+ n * 2.12194440e-4f", "- n * 2.12194440e-4f", "low part of ln 2 subtracted"),
        Mutant("exp-clamp", "x < -87.3365f ?", "false ?", "no zero below exp's range"),
        Mutant("tanh-branch", "magnitude < 0.625f", "magnitude < 6.25f", "polynomial of tanh beyond its range"),
        Mutant("tanh-sign", "bit_cast<U32>(far) | (bit_cast<U32>(x) & 0x80000000)", "bit_cast<U32>(far)",
               "tanh positive for negative arguments"),
        # gather_sum.
        Mutant("gather-last", "last = a.end[r];", "last = a.end[r] - 1;", "last hit dropped"),
        Mutant("gather-index", "a.coefficients[k])", "a.coefficients[k - first])", "wrong coefficient index"),
        Mutant("gather-rows", "(a.out_rows ? a.out_rows[r] : r)", "r", "row permutation ignored"),
        Mutant("gather-weights", "sum += coefficient(k) * load", "sum += load", "coefficients forgotten in the tail"),
        # The maximum and the sums of a row.
        Mutant("max-accumulator", "maximum<A>(best[2], best[3])", "maximum<A>(best[2], best[2])",
               "maximum misses a quarter of the columns"),
        Mutant("max-fill", "kLanes, kLowest), best[0]);", "kLanes, 0), best[0]);", "maximum of negative logits is 0"),
        Mutant("max-lane", "0; lane < kLanes; ++lane) m =", "1; lane < kLanes; ++lane) m =", "maximum misses a lane"),
        Mutant("max-uncapped", "m = capped(Vec<A>{} + row_maximum(x, n), cap)[0]", "m = row_maximum(x, n)",
               "maximum of raw logits subtracted from capped ones"),
        Mutant("sum-minus-max", "e = exp_nonpositive(z - m);", "e = exp_nonpositive(z);", "maximum not subtracted"),
        Mutant("sum-block", "n - start < kBlock ? n : start + kBlock;", "n - start < kBlock ? n : start + kBlock - 1;",
               "one column a block dropped"),
        Mutant("sum-tail", "for (int lane = static_cast<int>(stop - v); lane < kLanes; ++lane) z[lane] = kLowest;", "",
               "capped lanes past the end counted"),
        Mutant("sum-masked", "z > kLowest ? z - m : Vec<A>{}", "z - m", "masked columns in the mean of smoothing"),
        Mutant("sum-columns", "z > kLowest ? Vec<A>{} + A(1) : Vec<A>{}", "Vec<A>{} + A(1)",
               "masked columns in the number of columns"),
        # Rows in blocks of columns.
        Mutant("block-rescale", "total.exps *= std::exp(double(before) - m);", "",
               "sums of earlier blocks keep their old maximum"),
        Mutant("block-smoothing", "total.logits -= total.columns * (double(m) - before);", "",
               "differences of earlier blocks keep their old maximum"),
        Mutant("masked-row", "maximum == -std::numeric_limits<A>::infinity() ? A(0) : maximum", "maximum",
               "a block of -inf alone is NaN"),
        Mutant("block-maximum", "total.maximum = m;", "total.maximum = before;", "maximum not carried on"),
        Mutant("block-label", "v = labels[i] - a.block_start;", "v = labels[i];", "label looked for in every block"),
        Mutant("block-label-capped", "capped(Vec<A>{} + load_one(x + v), cap)[0]", "(Vec<A>{} + load_one(x + v))[0]",
               "label's logit kept without the cap"),
        # Exponentials kept for the gradient.
        Mutant("keep-tail", "if constexpr (keep) store(x + v, e, stop - v);", "", "exponentials of the tail not kept"),
        Mutant("keep-reused", "if constexpr (kept) return z * factor;", "", "kept exponentials taken for logits"),
        Mutant("keep-16-bit", "plain && sizeof(T) > 2;", "plain;", "exponentials rounded to 16 bits"),
        Mutant("keep-forward", ": row_sums<T, plain, false>(x", ": row_sums<T, plain, kKeep>(x",
               "logits overwritten without a gradient"),
        # The gradient at the columns.
        Mutant("grad-minus-max", "return exp_nonpositive(z - m) * factor;", "return exp_nonpositive(z) * factor;",
               "maximum not subtracted"),
        Mutant("grad-uniform", "- (z > kLowest ? Vec<A>{} + uniform : Vec<A>{})", "", "smoothing forgotten"),
        Mutant("grad-masked", "(z > kLowest ? Vec<A>{} + uniform : Vec<A>{})", "uniform", "masked columns smoothed"),
        Mutant("grad-cap", " * (A(1) - t * t);", ";", "derivative of the softcap forgotten"),
        Mutant("grad-tail", "if (v < n) store(x + v, g", "if (false) store(x + v, g", "tail keeps logits"),
        # The labels.
        Mutant("row-stride", "static_cast<T*>(a.logits) + r * a.stride", "static_cast<T*>(a.logits) + r * n",
               "stride of the rows ignored"),
        Mutant("label-ignored", "labels[i] == a.ignore_index || ", "", "ignore_index taken for a column"),
        Mutant("label-weightless", " || a.position_scale[i] == 0) continue;", ") continue;", "label of weight 0"),
        Mutant("label-twice", "target->pull += a.position_scale[i];", "target->pull = a.position_scale[i];",
               "duplicate labels count once"),
        Mutant("label-distinct", "while (target != targets.end() && target->label != labels[i]) ++target;",
               "target = targets.end();", "duplicate labels stand apart"),
        Mutant("label-cap", "capped(Vec<A>{} + load_one(x + labels[i]), cap)", "(Vec<A>{} + load_one(x + labels[i]))",
               "label's logit without softcap"),
        Mutant("label-pull", "- g * (1 - smoothing) * t.pull;", "+ g * (1 - smoothing) * t.pull;", "labels repel"),
        Mutant("label-smoothed", "- g * (1 - smoothing) * t.pull;", "- g * t.pull;", "1 - label_smoothing forgotten"),
        Mutant("label-uniform", "gradient -= uniform;", "gradient -= 0;", "smoothing forgotten at labels"),
        Mutant("label-slope", "1 - (t.logit / a.logit_softcap) * (t.logit / a.logit_softcap);", "1;",
               "derivative of the softcap forgotten at labels"),
        # The set objective.
        Mutant("set-clamp", "nll < 0 ? 0.0 : nll", "nll", "loss below 0 by rounding"),
        Mutant("set-masked", "t.logit == best ? 1.0 : std::exp(t.logit - best)", "std::exp(t.logit - best)",
               "NaN where all labels are masked"),
        Mutant("set-share", "t.pull *= scale / total;", "t.pull *= scale;", "pulls not divided by their total"),
        # The loss, and what its gradient is multiplied by.
        Mutant("loss-mean", "sums.logits / sums.columns)", "sums.logits / n)", "mean over masked columns too"),
        Mutant("loss-unlabelled", "scale == 0 ? 0.0 : loss;", "loss;", "NaN logits of a row without labels"),
        Mutant("factor-z", "(1 + 2 * a.z_loss * lse)", "(1 + a.z_loss * lse)", "factor 2 of the z-loss"),
        Mutant("factor-lse", " + u) / sums.exps;", ") / sums.exps;", "gradient of lse dropped"),
        Mutant("factor-uniform", "g * smoothing * scale / sums.columns", "smoothing * scale / sums.columns",
               "smoothing without the upstream gradient"),
        Mutant("zero-row", "std::memset(x, 0, n * sizeof(T));", "", "row without labels keeps its logits"),
        Mutant("zero-upstream", "(scale == 0 || g == 0) && u == 0", "scale == 0 && u == 0",
               "NaN logits of a row without upstream gradient"),
        Mutant("zero-lse", "(scale == 0 || g == 0) && u == 0", "scale == 0 || g == 0", "gradient of lse alone dropped"),
        # Sums of columns.
        Mutant("column-add", "a.add ? load(out + c, count, A(0)) : Vec<A>{}", "Vec<A>{}", "add ignored"),
        Mutant("column-block", "r < start + kBlock;", "r < start + kBlock - 1;", "one row a block dropped"),
        Mutant("accumulate-add", "a.add ? load(a.out + i, count, 0.0f) + value : value", "value", "add ignored"),
    ],
    "csrc/cpu/bags.cpp": [
        Mutant("range-limit", "ids[i] >= limit", "ids[i] > limit", "first id past the table accepted"),
        Mutant("range-ignored", " && ids[i] != ignored) return i;", ") return i;", "ignored id refused"),
        Mutant("bags-number", "plan.bags[place] = bag;", "plan.bags[place] = p;", "position in place of the bag"),
        Mutant("bags-weight", "coefficients[p];", "coefficients[i];", "coefficient of the first bag"),
        Mutant("bags-end", "plan.offsets[rows] = next;", "plan.offsets[rows] = hits;", "last row takes the pieces"),
        Mutant("piece-size", "next + BagsById::kPiece, end", "next + BagsById::kPiece + 1, end", "piece too long"),
        Mutant("piece-last", "piece_offsets.size()) - 1);", "piece_offsets.size()) - 2);", "last piece dropped"),
        Mutant("balance-rows", "(offsets[rows] + rows) * part / parts", "offsets[rows] * part / parts",
               "last rows without hits not covered"),
        Mutant("balance-cost", "offsets[middle] + middle < target", "offsets[middle] < target", "rows cost nothing"),
    ],
    "csrc/cuda/device.h": [
        Mutant("cuda-reduce-tree", "mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor",
               "mask = kWarp / 4; mask > 0; mask /= 2) value += shuffle_xor", "sum without half of the warp"),
        Mutant("cuda-reduce-max", "mask = kWarp / 2; mask > 0; mask /= 2) value = larger",
               "mask = kWarp / 4; mask > 0; mask /= 2) value = larger", "maximum without half of the warp"),
    ],
    "csrc/cuda/loss_rows.h": [
        # A row in packs, the packs in slices.
        Mutant("cuda-slice", "last = min(first + length, row.count)", "last = min(first + length - 1, row.count)",
               "last pack of a slice dropped"),
        Mutant("cuda-edge", "return row.inside(p, i); });", "return true; });", "columns outside the row counted"),
        Mutant("cuda-edge-store", "if (inside(p, i)) narrow(pack[i], x[begin(p) + i]);",
               "narrow(pack[i], x[begin(p) + i]);", "columns outside the row written"),
        Mutant("cuda-edge-begin", "begin = first + (first == 0 && !row.whole(0));", "begin = first;",
               "first pack taken for a whole one"),
        Mutant("cuda-edge-end", "end = last - (last == row.count && !row.whole(row.count - 1));", "end = last;",
               "last pack taken for a whole one"),
        Mutant("cuda-edge-twice", "p = max(begin, end); p < last", "p = end; p < last",
               "only pack of a row counted twice"),
        Mutant("cuda-edge-thread", "if (threadIdx.x != 0) return;", "if (lane() != 0) return;",
               "every warp counts the edges"),
        Mutant("cuda-head", "begin(p) >= 0 && begin(p) + kPack<T> <= vocabulary", "begin(p) + kPack<T> <= vocabulary",
               "first pack begins before the row"),
        Mutant("cuda-cache", "cached ? cache + slice.mine() - slice.first : to",
               "cached ? cache + slice.mine() - slice.begin : to", "cached packs out of step"),
        # Warps of columns, their batches, and the warp of the labels.
        Mutant("cuda-label-warp", "threadIdx.x >= blockDim.x - kWarp;", "threadIdx.x < kWarp;",
               "first warp has the labels, and its columns nobody"),
        Mutant("cuda-step", "step = static_cast<int>(blockDim.x) - kWarp;", "step = static_cast<int>(blockDim.x);",
               "columns left to the warp of the labels"),
        Mutant("cuda-batch-lowest", ": P::lowest();", ": P{};", "packs past the slice count as zeros"),
        Mutant("cuda-batch-last", "if (p < slice.end) take(std::false_type{});", "", "packs short of a batch dropped"),
        Mutant("cuda-every-block", "if (has_labels && (gradient || rank == 0)) {", "if (has_labels && rank == 0) {",
               "factors of the first block alone"),
        # Running sums, and how they come together.
        Mutant("cuda-rescale", "sums.exps *= power<T>(sums.maximum - best);", "", "sums keep their old maximum"),
        Mutant("cuda-rescale-logits", "sums.logits += sums.columns * (sums.maximum - best);", "sums.logits += 0;",
               "differences keep their old maximum"),
        Mutant("cuda-pair-max", "larger(best, larger(two[0], two[1]))", "larger(best, two[0])",
               "maximum of the even columns alone"),
        Mutant("cuda-masked", "sums.maximum == kLowest ? A(0) : sums.maximum;", "sums.maximum;",
               "columns of -inf alone are NaN"),
        Mutant("cuda-above", "return x == m ? A(0) : x - m;", "return x - m;",
               "a warp without columns is NaN"),
        Mutant("cuda-nan", "warp_sum(mine.exps * power<T>(shift));",
               "warp_sum(mine.maximum > -static_cast<A>(INFINITY) ? mine.exps * power<T>(shift) : A(0));",
               "NaN of a lane that saw nothing else"),
        Mutant("cuda-warp-shift", "warp_sum(mine.exps * power<T>(shift));", "warp_sum(mine.exps);",
               "lanes' sums not moved to one maximum"),
        Mutant("cuda-warp-logits", "? mine.logits + mine.columns * shift : A(0)", "? mine.logits : A(0)",
               "lanes' differences not moved to one maximum"),
        Mutant("cuda-warp-empty", "mine.columns > 0 ? mine.logits + mine.columns * shift : A(0)",
               "mine.logits + mine.columns * shift", "NaN differences of a lane without columns"),
        Mutant("cuda-cluster-shift", "mine.exps * power<T>(shift) + other.exps", "mine.exps + other.exps",
               "sums of a lane's first warp not moved to one maximum"),
        Mutant("cuda-cluster-other", "+ other.exps * power<T>(others);", "+ other.exps;",
               "sums of a lane's later warps not moved to one maximum"),
        Mutant("cuda-cluster-logits", "if (mine.columns > 0) mine.logits += mine.columns * shift;", "",
               "differences of a lane's first warp not moved to one maximum"),
        Mutant("cuda-cluster-columns", "mine.columns += other.columns;", "mine.columns = other.columns;",
               "columns of a lane's last warp alone"),
        Mutant("cuda-cluster-warps", "/ kWarp - 1, rank = lane() / 4;", "/ kWarp - 2, rank = lane() / 4;",
               "last warp of columns left out"),
        Mutant("cuda-cluster-blocks", "rank < static_cast<int>(cluster_size());", "rank < 1;",
               "sums of the first block alone"),
        Mutant("cuda-cluster-rank", "cluster_shared(warps + w, rank)", "cluster_shared(warps + w, 0)",
               "first block's sums in place of the others'"),
        # Barriers.
        Mutant("cuda-publish", "  cluster_arrive();\n  cluster_wait();\n", "  __syncthreads();\n",
               "sums of other blocks read before they are there"),
        Mutant("cuda-read", "  cluster_arrive_relaxed();  // after", "  // after",
               "nobody says that the sums have been read"),
        Mutant("cuda-leave", "  cluster_wait();  // no block leaves", "  // no block leaves",
               "a block leaves while its sums are read"),
        Mutant("cuda-result", "  if constexpr (gradient) {\n    __syncthreads();", "  if constexpr (gradient) {",
               "result read before it is there"),
        Mutant("cuda-label-last", "      __syncthreads();\n      for", "      for", "label columns overwritten"),
        Mutant("cuda-label-barrier", "  warp_barrier();\n  for", "  for", "labels compared before all are there"),
        # Labels, loss and gradient.
        Mutant("cuda-leads", "if (j < i) leads = false;", "", "duplicate labels stand apart"),
        Mutant("cuda-twice", "pull += targets[j].weight;", "pull = targets[j].weight;", "duplicate labels count once"),
        Mutant("cuda-weightless", "if (target.weight != 0) {", "{", "label of weight 0"),
        Mutant("cuda-label-cap", "capped(widen(x[y]), static_cast<A>(a.logit_softcap))", "widen(x[y])",
               "label's logit without softcap"),
        Mutant("cuda-set-leads", "if (t.leads) total += t.pull", "if (t.label >= 0) total += t.pull",
               "duplicates counted in the set"),
        Mutant("cuda-set-share", "targets[i].pull *= scale / total;", "targets[i].pull *= scale;",
               "pulls not divided by their total"),
        Mutant("cuda-set-clamp", "scale * positive(below(best) - log(total));", "scale * (below(best) - log(total));",
               "loss below 0 by rounding"),
        Mutant("cuda-mean", "sums.logits / sums.columns)", "sums.logits / a.vocabulary)",
               "mean over masked columns too"),
        Mutant("cuda-factor-z", "(1 + 2 * z_loss * lse)", "(1 + z_loss * lse)", "factor 2 of the z-loss"),
        Mutant("cuda-factor-lse", " + u) / sums.exps;", ") / sums.exps;", "gradient of lse dropped"),
        Mutant("cuda-product-first", "exp2_fast(fma(pack[i] - row.maximum, kLog2E, row.log2_factor));",
               "exp2_fast(fma(pack[i], kLog2E, row.log2_factor - row.maximum * kLog2E));",
               "maximum subtracted from a rounded product"),
        Mutant("cuda-log2-factor", "= log2(fabs(result.factor));", "= -log2(fabs(result.factor));",
               "16-bit gradients divided by their factor"),
        Mutant("cuda-negative", "result.factor < 0 ? 0x80008000u : 0;", "0;", "factor below 0 without its sign"),
        Mutant("cuda-negative-pair", "result.factor < 0 ? 0x80008000u : 0;", "result.factor < 0 ? 0x8000u : 0;",
               "factor below 0 without its sign at odd columns"),
        Mutant("cuda-nothing", "(scale == 0 || g == 0) && u == 0", "scale == 0 && u == 0",
               "NaN logits of a row without upstream gradient"),
        Mutant("cuda-zero", "store_global(to, Words4{0, 0, 0, 0});", ";", "row without labels keeps its logits"),
        Mutant("cuda-zero-edge", "result.nothing ? P{} : gradient_pack", "gradient_pack",
               "NaN logits at the edges of a row without labels"),
        Mutant("cuda-zero-label", "if (!result.nothing) {", "{", "NaN labels of a row without upstream gradient"),
        Mutant("cuda-cap", "(A(1) - t * t);", "A(1);", "derivative of the softcap forgotten"),
        Mutant("cuda-uniform", "(z > -static_cast<A>(INFINITY) ? row.uniform : A(0))", "row.uniform",
               "masked columns smoothed"),
        Mutant("cuda-label-pack", "return (column + head) / kPack<T>;", "return column / kPack<T>;",
               "label patched by the block before"),
        Mutant("cuda-label-slice", "row.pack_of(t.label) >= slice.last", "row.pack_of(t.label) >= slice.end",
               "label in the last pack not patched"),
        Mutant("cuda-label-uniform", "d -= result.uniform;", "d -= 0;", "smoothing forgotten at labels"),
        Mutant("cuda-label-slope", "if (cap != 0) d *= 1 - (t.logit / cap) * (t.logit / cap);", "",
               "derivative of the softcap forgotten at labels"),
    ],
    "csrc/cuda/bag_embedding.h": [
        Mutant("cuda-gather-first", "term(first + lane)", "term(begin + lane)", "first 32 rows again and again"),
        Mutant("cuda-gather-row", "shuffle(mine.row, (k + b) % kWarp)", "shuffle(mine.row, k % kWarp)",
               "row of the lane before"),
        Mutant("cuda-gather-weight", "shuffle(mine.coefficient, (k + b) % kWarp)", "mine.coefficient",
               "coefficient of the lane that adds"),
        Mutant("cuda-slab", "int64_t(blockIdx.y) * kSlab<n>", "int64_t(blockIdx.y) * kWarp * n",
               "slabs overlap"),
        Mutant("cuda-slab-end", "if (c >= dim) continue;", "if (column >= dim) continue;",
               "columns past the slab's end written"),
        Mutant("cuda-long", "if (end - begin > kWindow) return;", "if (end - begin >= kWindow) return;",
               "row with a window of hits left out"),
        Mutant("cuda-piece-start", "max(a.offsets[v], static_cast<int>(start))", "a.offsets[v]",
               "pieces begin with the row"),
        Mutant("cuda-piece-stop", "min(a.offsets[v + 1], stop)", "a.offsets[v + 1]", "pieces end with the row"),
        Mutant("cuda-piece-slot", "(w == window && begin > start)", "(w == window)", "row that fills its first window"),
        Mutant("cuda-join", "(end - 1) / kWindow + 1, piece", "end / kWindow, piece", "last piece of a row dropped"),
        Mutant("cuda-join-first", "|| begin < start) return;", ") return;",
               "later windows write their part of the row"),
        Mutant("cuda-unread", "return {w == 0 ? -1 : id, ", "return {id, ", "rows that count 0 are read"),
        Mutant("cuda-padding", "if (weighted && pool.padded && id == pool.padding_idx) return {-1, 0};", "",
               "padding taken for an id"),
        Mutant("cuda-padding-weight", "if (padded && bag[i] == padding_idx) return 0;", "",
               "padding counts in the divisor"),
        Mutant("cuda-offset", "if (keys[middle] < v)", "if (keys[middle] <= v)", "hits of the row before"),
    ],
    "csrc/cuda/shape.h": [
        Mutant("cuda-shape-blocks", "device.clusters && blocks < 8", "blocks < 8", "clusters where there are none"),
        Mutant("cuda-shape-cluster", "blocks < 8 && slice", "blocks < 16 && slice", "clusters larger than portable"),
        Mutant("cuda-shape-memory", "fixed + slice <= (device", "slice <= (device", "labels' memory not counted"),
        Mutant("cuda-shape-bags", "bag_size > longest_bag)", "bag_size > longest_bag + 1)",
               "a bag of one label too many"),
        Mutant("cuda-shape-registers", "32 / together - 1", "32 - 1",
               "blocks that fit by shared memory and not by registers"),
        Mutant("cuda-shape-loss", "gradient && fixed", "fixed", "a loss without gradient keeps its row"),
    ],
}

# Between the CUDA kernels and Python: launches, sizes of buffers, addresses.
CUDA_HOST: dict[str, list[Mutant]] = {
    "csrc/cuda/op.h": [
        Mutant("launch-shared", "extent.shared_bytes > kUnasked", "extent.shared_bytes > 2 * kUnasked",
               "more shared memory than a kernel has unasked"),
        Mutant("launch-cluster", "extent.cluster > 1 ? 1 : 0;", "0;", "blocks of a row without a cluster"),
        Mutant("launch-blocks", "(work + per_block - 1) / per_block;", "work / per_block;", "last block missing"),
    ],
    "csrc/cuda/multi_hot_cross_entropy.cu": [
        Mutant("launch-code", "compiled.ptxVersion >= 90 && device_attribute", "device_attribute",
               "clusters in code that was compiled without"),
        Mutant("launch-rows", "blocks_for(rows * shape.blocks, 1)", "blocks_for(rows, 1)", "one block a row"),
        Mutant("launch-stride", "a.stride = logits.stride(0);", "a.stride = vocabulary;", "padding between rows"),
        Mutant("launch-upstream", "a.grad_loss_stride = g && g->dim() == 1;", "a.grad_loss_stride = 1;",
               "one upstream gradient read as one a row"),
    ],
    "csrc/cuda/bag_embedding.cu": [
        Mutant("launch-address", "&& address(a) % 16 == 0 && address(b) % 16 == 0;", ";",
               "packs at addresses that are not theirs"),
        Mutant("launch-scratch", "std::max<int64_t>(1, static_cast<int64_t>(bytes))", "1",
               "less memory than the sort asks for"),
        Mutant("launch-bits", "while (num_embeddings >> bits) ++bits;",
               "while (num_embeddings >> (bits + 1)) ++bits;", "keys sorted without their highest bit"),
        Mutant("launch-offsets", "offsets = integers(num_embeddings + 1);", "offsets = integers(num_embeddings);",
               "no room for the end of the last row"),
        Mutant("launch-offsets-grid", "{blocks_for(num_embeddings + 1, kThreads), kThreads}",
               "{blocks_for(num_embeddings, kThreads), kThreads}", "end of the last row not written"),
        Mutant("launch-pieces", "count > kWindow ? 2 * windows : 0, dim}", "count > kWindow ? windows : 0, dim}",
               "room for one piece of a window"),
        Mutant("launch-pieces-grid", "grid<n()>(2 * windows, dim)", "grid<n()>(windows, dim)", "late pieces missing"),
        Mutant("launch-scales", "{c.weighted ? c.bags : 0}", "{0}", "no room for the bags' scales"),
        Mutant("launch-slabs", "blocks_for(dim, kSlab<n>)", "blocks_for(dim, 2 * kSlab<n>)", "late columns missing"),
    ],
    "csrc/cuda/scaled_copy.h": [
        Mutant("scaled-factor", "values[i] = scale * pack[i];", "values[i] = pack[i];", "factor ignored"),
        Mutant("scaled-last-factor", "narrow(scale * source[i], out[i]);", "narrow(source[i], out[i]);",
               "factor ignored by the last thread"),
        Mutant("scaled-last", "i = begin; i < count; ++i", "i = begin; i < count - 1; ++i", "last number not written"),
        Mutant("scaled-end", "if (begin + n <= count) {", "if (begin < count) {", "numbers past the end"),
    ],
    "csrc/cuda/scaled_copy.cu": [
        Mutant("scaled-source", " && address(source) % 16 == 0;", ";", "packs of a source that is not aligned"),
        Mutant("scaled-out", "address(out) % 16 == 0 && ", "", "packs of a result that is not aligned"),
        Mutant("scaled-grid", "kThreads * n()), kThreads}", "kThreads * 8), kThreads}",
               "an eighth of the threads where nothing is aligned"),
    ],
}

PYTHON: dict[str, list[Mutant]] = {
    "csrc/cpu/kernels_impl.h": [  # what needs more rows than a C++ test has
        Mutant("column-compensation", "sum[c] - lost[c]", "sum[c]", "bias gradient drifts with the rows"),
    ],
    "tst_ext/arguments.py": [
        Mutant("mean-rows", "count = valid.sum(0).to(w.dtype)", "count = torch.full_like(w, len(labels))",
               "mean over all rows, not those with a label"),
        Mutant("mean-weights", "count = count * w.sum()", "count = count * 1", "weights not divided by their sum"),
        Mutant("mean-set", "valid = valid.any(1, keepdim=True).expand_as(valid)", "valid = valid & True",
               "rows of the set objective counted by their first label"),
    ],
    "tst_ext/bags.py": [
        Mutant("fold-shift", "bag_size - 1 if shifted else bag_size", "bag_size", "labels one token late"),
        Mutant("fold-boundary", "torch.where(position < bag_size, -1, bag - 1)", "bag - 1", "document boundary"),
        Mutant("fold-slot", "slot = position % bag_size", "slot = t % bag_size", "documents do not begin a bag"),
        Mutant("fold-end", "ends[..., -1] = True", "pass", "a sequence does not end its document"),
    ],
    "tst_ext/fallback.py": [
        Mutant("plain-twice", "leads = valid & ~same.tril(-1).any(-1)", "leads = valid", "duplicate labels pull twice"),
        Mutant("plain-chunks", "z.T, h[part], start > 0)", "z.T, h[part], False)",
               "weight gradient of the last chunk alone"),
        Mutant("plain-bias", "column_sums if start == 0 else db + column_sums", "column_sums",
               "bias gradient of the last chunk alone"),
        Mutant("plain-upstream", "grad_loss.dim() == 0 else grad_loss[part]",
               "grad_loss.dim() == 0 else grad_loss[:chunk]",
               "upstream of the first chunk"),
        Mutant("plain-round", "    elif add:\n        out += a @ b",
               "    elif add:\n        out.copy_(out.to(a.dtype) + a @ b)",
               "bfloat16 weight gradient summed in bfloat16"),
        Mutant("plain-add-bias", "torch.addmm(bias, h[part], w.T, out=z)", "torch.mm(h[part], w.T, out=z)",
               "bias forgotten"),
        Mutant("cuda-chunk", "// 1024 * 1024, 2048), 8192)", "// 1024 * 1024, 2048), 4096)",
               "chunks half as large"),
        Mutant("cuda-chunk-memory", "max(memory // 32 // ", "max(memory // 64 // ", "chunks of half the memory"),
        Mutant("cuda-bias-buffer", "padded_columns(vocabulary, bias is not None)", "padded_columns(vocabulary)",
               "product rounded before the bias is added"),
        Mutant("plain-scaled-copy", "torch.mul(source, factor, out=out)", "out.copy_(source)", "factor ignored"),
    ],
    "tst_ext/ops.py": [
        Mutant("upstream", "return (gradient * factor).to(dtype)", "return gradient.to(dtype)",
               "gradient not scaled by the upstream one"),
        Mutant("upstream-in-place", "        gradient.mul_(factor)", "        pass",
               "gradient of a graph that is not kept not scaled"),
        Mutant("upstream-read", "if not on_cpu or factor != 1:", "if factor != 1:", "waits for the device"),
        Mutant("upstream-lse", "gradient + more", "gradient", "gradient of lse dropped"),
        Mutant("kept-graph", "or torch._C._autograd._get_current_graph_task_keep_graph()", "or False",
               "two backward passes share their gradients"),
    ],
    "tst_ext/vocab_parallel.py": [
        Mutant("shard-outside", "torch.where(valid & (own >= 0) & (own < shard), own, ELSEWHERE)",
               "torch.where(valid & (own >= 0) & (own < shard), own, 0)", "another process's label is row 0 here"),
        Mutant("shard-lse", "all_lse = largest[0] + log_sum", "all_lse = own_lse", "log-sum-exp of one shard"),
        Mutant("shard-push", "push = share - pull * own_scale", "push = share",
               "own labels' part of the softmax twice"),
        Mutant("shard-share", "torch.where(factor == 0, 0, factor * ((own_lse - largest[0]) - log_sum).exp())",
               "factor", "softmax over one shard"),
        Mutant("shard-set", "0, pull * part)", "0, pull)",
               "labels of other shards left out of the set"),
        Mutant("shard-mean", "total[2] / total[3])\n    loss", "sums[2] / sums[3])\n    loss",
               "mean logit of one shard"),
        Mutant("shard-slope", "uniform *= 1 - (z / logit_softcap).square()", "pass",
               "derivative of the softcap forgotten by smoothing"),
        Mutant("shard-sum", "dist.all_reduce(dhidden, group=tp_group)", "pass", "hidden's gradient from one shard"),
        Mutant("shard-order", "torch.cat(parts, -2)", "torch.cat(parts[::-1], -2)",
               "parts of the sequence out of order"),
        Mutant("shard-float64", "t.to(torch.float64, copy=True)", "t.to(torch.float64)",
               "float64 results overwrite what they are computed from"),
    ],
    "tst_ext/derivatives.py": [
        Mutant("second-derivative", "for t in (*grads, link)", "for t in grads",
               "gradient of a gradient is 0 without a word"),
    ],
    "csrc/cpu/loss.h": [
        Mutant("chunk-labels", "int64_t>() + start * args.bag_size", "int64_t>() + start",
               "labels of other rows in later chunks"),
        Mutant("chunk-upstream", "grad_loss_.data() + start", "grad_loss_.data()", "upstream of the first chunk"),
        Mutant("chunk-lse", "grad_lse_.data() + start", "grad_lse_.data()", "gradient of lse of the first chunk"),
        Mutant("block-rows", "partial_.data() + start", "partial_.data()", "sums of the first chunk"),
    ],
    "csrc/cpu/linear_multi_hot_cross_entropy.cpp": [
        Mutant("threads-accumulate", "16384, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });",
               "16384, [&](int64_t begin, int64_t end) { kernel(args, 0, end); });",
               "a thread adds to other threads' part of the weight's gradient"),
        Mutant("threads-column-sum", "1024, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });",
               "1024, [&](int64_t begin, int64_t end) { kernel(args, 0, end); });",
               "a thread adds to other threads' part of the bias gradient"),
        Mutant("chunk-last", "gradient && start < rows; start", "gradient && start + chunk <= rows; start",
               "last, short chunk dropped"),
        Mutant("chunk-bias", "(db, z, start > 0)", "(db, z, false)", "bias gradient of one chunk alone"),
        Mutant("chunk-weight", "(dw, z, h_chunk, start > 0)", "(dw, z, h_chunk, false)",
               "weight gradient of one chunk alone"),
        Mutant("staged-block", "narrow(z, 1, v, count)", "narrow(z, 1, 0, count)",
               "bfloat16 weight gradient of the first block of the vocabulary"),
    ],
    "csrc/cpu/multi_hot_cross_entropy.cpp": [
        Mutant("forward-writes", "loss.run(0, z, false);", "loss.run(0, z, true);", "forward overwrites the logits"),
    ],
    "csrc/cpu/bag_embedding.cpp": [
        Mutant("padding-divisor", "total == 0 ? 1.0 : total;", "total == 0 ? 1.0 : static_cast<double>(bag_size);",
               "padding counts in the divisor"),
        Mutant("long-rows", "(0, long_rows, 1,", "(0, long_rows - 1, 1,", "last long row not finished"),
    ],
}
# fmt: on


def copy_tree(folder: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    compiled = [str(path.relative_to(ROOT)) for path in ROOT.glob("tst_ext/_C*.so")]
    for name in filter(None, names + compiled):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


class Tree:
    """The copy of the working tree with a way to build it and the tests that judge it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Neither flags of the caller nor CUDA, which no mutant touches; the copy comes before an editable installation.
        flags = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
        self.environment = {name: value for name, value in os.environ.items() if name not in flags} | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may be of the size and the second of what it replaces
            "CUDA_VISIBLE_DEVICES": "",
            "TST_CUDA": "0",
            "MAX_JOBS": JOBS,
        }

    def run(self, command: list[str], seconds: int | None = None) -> tuple[int | str, str]:
        """Exit status, or "timeout", and output."""
        pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(command, cwd=self.folder, env=self.environment, start_new_session=True, **pipes)
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "timeout", process.communicate()[0]


class CppTree(Tree):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # -O1: a mutant is compiled in 60 % of the time of -O3, and the tests take no longer.
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DTST_REQUIRE_TESTS=ON"]
        status, output = self.run(["cmake", "-S", ".", "-B", "build/mutation", *options])
        if status:
            sys.exit(output)

    def build(self, file: str) -> tuple[int | str, str]:
        return self.run(["cmake", "--build", "build/mutation", "--parallel", JOBS, "--target", "tst_tests"])

    def test(self, mutated: str) -> Outcome:
        # Up to the first failure: a broken kernel fails in every column, and printing that takes minutes.
        emulated = "Emulated/*:*Cuda*:Emulator.*"  # a mutant of csrc/cuda breaks only these, and no other mutant does
        chosen = {"": "*", "csrc/cuda": emulated}.get(os.path.dirname(mutated), "-" + emulated)
        command = ["build/mutation/tst_tests", "--gtest_break_on_failure", f"--gtest_filter={chosen}"]
        status, output = self.run(command, CPP_SECONDS)
        if status == 0:
            return Outcome("survived")
        begun = re.findall(r"^\[ RUN      \] (?:\w+/)?(\w+\.\w+)", output, re.MULTILINE)
        late = " (timeout)" if status == "timeout" else ""
        return Outcome("killed", (begun[-1] if begun else f"status {status}") + late, output)


PYTEST_OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--capture=sys"]  # not what a sanitizer writes to stderr


def outcome_of_pytest(status: int | str, output: str) -> Outcome:
    failing = re.findall(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", output, re.MULTILINE)
    failing += re.findall(r"AddressSanitizer: [\w-]+|runtime error: [^,\n]+", output)  # which end the process
    return Outcome("killed", failing[0] if failing else f"status {status}", output) if status else Outcome("survived")


class PythonTree(Tree):
    # Training, packaging and processes of their own take minutes and judge other things.
    ignored = ["train", "integrations", "test_build.py", "test_memory.py", "test_compile.py", "test_distributed.py"]
    ignored += ["test_main.py", "test_self_check.py", "test_distribution.py", "test_recipes.py", "test_examples.py"]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        _, imported = self.run([sys.executable, "-c", "import tst_ext; print(tst_ext.__file__)"])
        assert imported.strip() == str(folder / "tst_ext/__init__.py"), f"not the copy's tst_ext: {imported}"

    def build(self, file: str) -> tuple[int | str, str]:
        parse = ["-c", "import ast, sys; ast.parse(open(sys.argv[1]).read())", file]
        return self.run([sys.executable, *(parse if file.endswith(".py") else ["setup.py", "build_ext", "--inplace"])])

    def test(self, mutated: str) -> Outcome:
        command = [sys.executable, "-m", "pytest", "tests", "-m", "not slow", *PYTEST_OPTIONS]
        status, output = self.run(command + [f"--ignore=tests/{name}" for name in self.ignored], PYTEST_SECONDS)
        return outcome_of_pytest(status, output)


class CudaHostTree(Tree):
    """The CUDA ops, as `make cuda-host-test` builds them and runs their own tests."""

    library = "build/cuda-host/libtst_cuda_host.so"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        options = ["-DTST_CUDA_HOST=ON", "-DTST_SANITIZE=address,undefined", f"-DPython3_EXECUTABLE={sys.executable}"]
        status, output = self.run(["cmake", "-S", ".", "-B", "build/cuda-host", *options])
        if status:
            sys.exit(output)

    def build(self, file: str) -> tuple[int | str, str]:
        return self.run(["cmake", "--build", "build/cuda-host", "--parallel", JOBS, "--target", "tst_cuda_host"])

    def test(self, mutated: str) -> Outcome:
        preload = [self.run(["g++", f"-print-file-name={name}.so"])[1].strip() for name in ("libasan", "libstdc++")]
        command = ["env", f"LD_PRELOAD={' '.join(preload)}", "ASAN_OPTIONS=detect_leaks=0"]
        command += [f"TST_CUDA_HOST={self.folder / self.library}", sys.executable, "-m", "pytest"]
        status, output = self.run([*command, "tests/test_cuda_host.py", *PYTEST_OPTIONS], PYTEST_SECONDS)
        return outcome_of_pytest(status, output)


TREES: dict[type[CppTree | PythonTree | CudaHostTree], dict[str, list[Mutant]]] = {
    CppTree: CPP,
    CudaHostTree: CUDA_HOST,
    PythonTree: PYTHON,
}


def judge(tree: CppTree | PythonTree | CudaHostTree, file: str, old: str = "", new: str = "") -> Outcome:
    path = tree.folder / file
    text = path.read_text()
    if old:
        path.write_text(text.replace(old, new))
    status, output = tree.build(file)
    outcome = Outcome("does not compile", output=output) if status else tree.test(file if old else "")
    path.write_text(text)
    return outcome


def main() -> int:
    mutants = [(tree, file, m) for tree, files in TREES.items() for file, group in files.items() for m in group]
    names = [m.name for _, _, m in mutants]
    assert len(set(names)) == len(names), "two mutants of one name"
    parser = argparse.ArgumentParser(description="Breaks one line at a time and demands that a test notices.")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these mutants alone")
    parser.add_argument("--table", action="store_true", help="print the result as a Markdown table too")
    arguments = parser.parse_args()

    results: list[tuple[str, Mutant, Outcome]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_tree(folder)
        for _, file, m in mutants:
            count = (folder / file).read_text().count(m.old)
            assert count == 1 and m.old != m.new, f"{m.name}: {m.old!r} occurs {count} times in {file}"
        for kind in TREES:
            chosen = [(file, m) for k, file, m in mutants if k is kind and m.name in (arguments.only or names)]
            chosen.sort(key=lambda each: not each[0].endswith(".py"))  # while the extension is not a mutant's
            if not chosen:
                continue
            tree = kind(folder)
            outcome = judge(tree, chosen[-1][0])  # builds the extension if any mutant does
            if outcome.state != "survived":
                sys.exit(f"{outcome.output}\n{kind.__name__} without a mutation: {outcome.state}, {outcome.failing}")
            for file, m in chosen:
                outcome = judge(tree, file, m.old, m.new)
                results.append((file, m, outcome))
                by = f" ({outcome.failing})" if outcome.failing else ""
                print(f"{outcome.state:8} {m.name}: {m.breaks}{by}", flush=True)
                if outcome.state == "does not compile":
                    print(outcome.output[-3000:])

    if arguments.table:
        print("\n| mutant | file | what is broken | killed by |\n| --- | --- | --- | --- |")
        for file, mutant, outcome in results:
            by = f"`{outcome.failing}`" if outcome.failing else f"**{outcome.state}**"
            print(f"| {mutant.name} | `{file}` | {mutant.breaks} | {by} |")
    bad = [mutant.name for _, mutant, outcome in results if outcome.state != "killed"]
    print(f"\n{len(results) - len(bad)} of {len(results)} mutants killed" + (f"; not: {', '.join(bad)}" if bad else ""))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
