// The CPU kernels themselves, compiled once per instruction set. The including file sets TST_ISA (a namespace) and
// TST_VECTOR_BYTES (the width of a register) after switching the compiler to that instruction set.
//
// Vectors are the compiler's own (GCC and Clang `vector_size`), so one source serves AVX-512, AVX2, SSE2 and NEON.
// Float32 and float64 vectors have the same number of lanes: float64 exists for gradcheck, not for speed.

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

#define TST_INLINE inline __attribute__((always_inline))

namespace tst::cpu::TST_ISA {
namespace {

constexpr int kLanes = TST_VECTOR_BYTES / 4;
constexpr int kUnroll = 4;  // independent accumulators: hides the latency (4 cycles) of max and add

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A))));
};
template <typename A>
using Vec = typename VecOf<A>::type;
using U16 = Vec<uint16_t>;
using U32 = Vec<uint32_t>;
using F32 = Vec<float>;

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
TST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage format <-> accumulation vector. Rounding is to nearest even; infinities and NaN survive.
TST_INLINE F32 widen(U16 bits, BFloat16) { return bit_cast<F32>(__builtin_convertvector(bits, U32) << 16); }

TST_INLINE U16 narrow(F32 value, BFloat16) {
  const U32 bits = bit_cast<U32>(value);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded, U16);
}

TST_INLINE F32 widen(U16 half, Float16) {
  const U32 bits = __builtin_convertvector(half, U32);
  const U32 magnitude = (bits & 0x7fff) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises half's subnormals on the way.
  const U32 finite = bit_cast<U32>(bit_cast<F32>(magnitude) * 0x1p112f);
  const U32 special = magnitude | 0x7f800000;
  return bit_cast<F32>((magnitude >= 0x0f800000 ? special : finite) | ((bits & 0x8000) << 16));
}

TST_INLINE U16 narrow(F32 value, Float16) {
  const U32 bits = bit_cast<U32>(value);
  const U32 magnitude = bits & 0x7fffffff;
  // Normal halves: add the rounding bias and let the carry run into the exponent. Subnormal ones: adding 0.5 puts
  // half's last place at float's last place, and the addition rounds.
  const U32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000;
  U32 half = magnitude < 0x38800000 ? subnormal : normal;
  const U32 infinity = U32{} + 0x7c00;
  half = magnitude >= 0x47800000 ? infinity : half;         // 65536 and above, infinity
  half = magnitude > 0x7f800000 ? infinity | 0x200 : half;  // NaN
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), U16);
}

template <typename T>
TST_INLINE Vec<Acc<T>> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    U16 bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen(bits, T{});
  } else {
    Vec<T> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
}

template <typename T>
TST_INLINE void store(T* to, Vec<Acc<T>> value) {
  if constexpr (sizeof(T) == 2) {
    const U16 bits = narrow(value, T{});
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

// A vector at the end of a row, `count` of its lanes inside.
template <typename T>
TST_INLINE Vec<Acc<T>> load(const T* from, int64_t count, Acc<T> fill) {
  if (count == kLanes) return load(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  Vec<Acc<T>> value = load(padded);
  for (int lane = static_cast<int>(count); lane < kLanes; ++lane) value[lane] = fill;
  return value;
}

template <typename T>
TST_INLINE void store(T* to, Vec<Acc<T>> value, int64_t count) {
  if (count == kLanes) return store(to, value);
  T padded[kLanes];
  store(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}

template <typename T>
TST_INLINE Acc<T> load_one(const T* from) {
  return load(from, 1, Acc<T>(0))[0];
}

template <typename T>
TST_INLINE void store_one(T* to, Acc<T> value) {
  store(to, Vec<Acc<T>>{} + value, 1);
}

template <typename A>
TST_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

// exp(x) for x <= 0 or NaN, 1.01 ulp at worst: x = n ln 2 + r with |r| <= ln(2) / 2, Cephes expf's polynomial in r, and
// n added to the exponent. Below the smallest normal result it is 0.
TST_INLINE F32 exp_nonpositive(F32 x) {
  const F32 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const F32 n = shifted - 12582912.0f;
  const F32 r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F32 result = bit_cast<F32>(bit_cast<U32>(p) + (bit_cast<U32>(shifted) << 23));
  return x < -87.3365f ? F32{} : (x == x ? result : x);
}

TST_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// tanh, 2 ulp at worst: Cephes tanhf's polynomial below 0.625, where (1 - e) / (1 + e) would cancel.
TST_INLINE F32 tanh(F32 x) {
  const F32 magnitude = bit_cast<F32>(bit_cast<U32>(x) & 0x7fffffff);
  const F32 e = exp_nonpositive(magnitude * -2.0f);
  const F32 far = (1.0f - e) / (1.0f + e);
  const F32 square = x * x;
  F32 p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const F32 near = p * square * x + x;
  const F32 signed_far = bit_cast<F32>(bit_cast<U32>(far) | (bit_cast<U32>(x) & 0x80000000));
  return magnitude < 0.625f ? near : (x == x ? signed_far : x);
}

TST_INLINE Vec<double> tanh(Vec<double> x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::tanh(x[lane]);
  return x;
}

template <typename T, typename O, bool weighted>
void gather_sum_rows(const GatherSum& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  static_assert(std::is_same_v<A, Acc<O>>);
  // The next row's sources are asked for meanwhile: short rows of random places defeat the hardware's prefetcher. Into
  // the second cache level: they would fill the first (16-bit, d = 1024, 16 a bag: 5.5 ms; second 3.8, none 5.6). Wider
  // rows are asked for their first lines alone and read two lines in turn, and the prefetcher does the rest (float32,
  // V = 4096, 6 a bag: 4.7 ms instead of 5.0, with AVX2 4.7 instead of 5.3).
  constexpr bool kWide = sizeof(T) > 2;
  constexpr int kVectors = kWide ? 128 / (kLanes * sizeof(T)) : kUnroll;
  const T* source = static_cast<const T*>(a.source);
  const A scale = static_cast<A>(a.scale);
  for (int64_t r = begin; r < end; ++r) {
    O* out = static_cast<O*>(a.out) + (a.out_rows ? a.out_rows[r] : r) * a.dim;
    const int64_t first = a.begin[r], last = a.end[r];
    const int64_t ahead = r + 1 < end && a.begin[r + 1] == last && a.end[r + 1] - last <= 16 ? a.end[r + 1] : last;
    const auto row = [&](int64_t k) { return source + (a.index ? a.index[k] : k) * a.dim; };
    const auto coefficient = [&](int64_t k) { return weighted ? static_cast<A>(a.coefficients[k]) : A(1); };
    for (int64_t k = last; kWide && k < ahead; ++k) {
      for (int64_t b = 0; b < 256; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(row(k)) + b, 0, 2);
    }
    int64_t c = 0;
    for (; c + kVectors * kLanes <= a.dim; c += kVectors * kLanes) {
      Vec<A> sum[kVectors] = {};
      for (int64_t k = first; k < last; ++k) {
        for (int u = 0; u < kVectors; ++u) sum[u] += coefficient(k) * load(row(k) + c + u * kLanes);
      }
      for (int64_t k = last; !kWide && k < ahead; ++k) {
        for (int64_t b = 0; b < kVectors * kLanes * int64_t(sizeof(T)); b += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(row(k) + c) + b, 0, 2);
        }
      }
      for (int u = 0; u < kVectors; ++u) store(out + c + u * kLanes, sum[u] * scale);
    }
    for (; c < a.dim; c += kLanes) {
      const int64_t count = a.dim - c < kLanes ? a.dim - c : kLanes;
      Vec<A> sum = {};
      for (int64_t k = first; k < last; ++k) sum += coefficient(k) * load(row(k) + c, count, A(0));
      store(out + c, sum * scale, count);
    }
  }
}

template <typename T, typename O>
void gather_sum(const GatherSum& a, int64_t begin, int64_t end) {
  if (a.coefficients)
    gather_sum_rows<T, O, true>(a, begin, end);
  else
    gather_sum_rows<T, O, false>(a, begin, end);
}

template <typename T>
Acc<T> row_maximum(const T* z, int64_t n) {
  using A = Acc<T>;
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  Vec<A> best[kUnroll];
  for (int u = 0; u < kUnroll; ++u) best[u] = Vec<A>{} + kLowest;
  int64_t v = 0;
  for (; v + kUnroll * kLanes <= n; v += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) best[u] = maximum<A>(load(z + v + u * kLanes), best[u]);
  }
  for (; v < n; v += kLanes) {
    best[0] = maximum<A>(load(z + v, n - v < kLanes ? n - v : kLanes, kLowest), best[0]);
  }
  best[0] = maximum<A>(maximum<A>(best[0], best[1]), maximum<A>(best[2], best[3]));
  A m = kLowest;
  for (int lane = 0; lane < kLanes; ++lane) m = best[0][lane] > m ? best[0][lane] : m;
  return m;
}

// What the logits go through before the softmax.
template <typename A>
TST_INLINE Vec<A> capped(Vec<A> x, A cap) {
  return cap == 0 ? x : cap * tanh(x / cap);
}

// What differences are taken from. Where a row is nothing but -inf it is 0: such logits add 0, and a NaN is still one.
template <typename A>
A base_of(A maximum) {
  return maximum == -std::numeric_limits<A>::infinity() ? A(0) : maximum;
}

// `plain`: no softcap, no smoothing. With `keep`, x_v becomes exp(z_v - m), which spares the second exp; the 16-bit
// formats would lose digits, a softcap and smoothing need the logit itself, so they go without.
template <typename T, bool plain, bool keep>
RowSums<double> row_sums(T* x, int64_t n, Acc<T> m, Acc<T> cap) {
  using A = Acc<T>;
  static_assert(plain || !keep);
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  constexpr int64_t kBlock = 128 * kLanes;  // each lane adds 128 terms, then moves to float64: lse within 16 eps
  RowSums<double> sums;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = n - start < kBlock ? n : start + kBlock;
    Vec<A> exps = {}, logits = {}, columns = {};
    const auto add = [&](Vec<A> z) {
      const Vec<A> e = exp_nonpositive(z - m);
      exps += e;
      if constexpr (!plain) {
        logits += z > kLowest ? z - m : Vec<A>{};
        columns += z > kLowest ? Vec<A>{} + A(1) : Vec<A>{};
      }
      return e;
    };
    int64_t v = start;
    for (; v + kLanes <= stop; v += kLanes) {
      const Vec<A> e = add(plain ? load(x + v) : capped(load(x + v), cap));
      if constexpr (keep) store(x + v, e);
    }
    if (v < stop) {
      Vec<A> z = load(x + v, stop - v, kLowest);
      if constexpr (!plain) {
        z = capped(z, cap);  // which lifts the lanes past the end to -cap
        for (int lane = static_cast<int>(stop - v); lane < kLanes; ++lane) z[lane] = kLowest;
      }
      const Vec<A> e = add(z);
      if constexpr (keep) store(x + v, e, stop - v);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.exps += exps[lane], sums.logits += logits[lane], sums.columns += columns[lane];
    }
  }
  return sums;
}

// x_v <- factor * exp(z_v - m), or factor * x_v where row_sums kept the exponentials. Without `plain`, minus `uniform`
// in the columns above -inf, times the derivative of the cap.
template <typename T, bool plain, bool kept>
void row_gradient(T* x, int64_t n, Acc<T> m, Acc<T> cap, Acc<T> factor, Acc<T> uniform) {
  using A = Acc<T>;
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  const auto gradient = [&](Vec<A> z) -> Vec<A> {
    if constexpr (kept) return z * factor;
    if constexpr (plain) return exp_nonpositive(z - m) * factor;
    z = capped(z, cap);
    const Vec<A> t = cap == 0 ? Vec<A>{} : z / cap;
    return (exp_nonpositive(z - m) * factor - (z > kLowest ? Vec<A>{} + uniform : Vec<A>{})) * (A(1) - t * t);
  };
  int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) store(x + v, gradient(load(x + v)));
  if (v < n) store(x + v, gradient(load(x + v, n - v, A(0))), n - v);
}

struct Target {  // a distinct label of a row
  int64_t label;
  double logit;  // z
  double pull;   // a_v of loss.h
};

// Adds a block of columns to the sums of those before it, and keeps the logits of the labels in it. Whether it is the
// row's last one.
template <typename T, bool plain>
bool add_block(const LossRows& a, int64_t r, T* x) {
  using A = Acc<T>;
  const int64_t n = a.block_columns;
  const A cap = static_cast<A>(a.options.logit_softcap);
  RowSums<double>& total = a.partial[r];
  const A before = static_cast<A>(total.maximum);
  const A m = maximum<A>(capped(Vec<A>{} + row_maximum(x, n), cap), Vec<A>{} + before)[0];
  const RowSums<double> block = row_sums<T, plain, false>(x, n, base_of(m), cap);
  if (m > before) {
    if (total.columns > 0) total.logits -= total.columns * (double(m) - before);
    total.exps *= std::exp(double(before) - m);
  }
  total.maximum = m;
  total.exps += block.exps, total.logits += block.logits, total.columns += block.columns;
  for (int64_t k = r * a.bag_size; k < (r + 1) * a.bag_size; ++k) {
    const int64_t v = a.labels[k] - a.block_start;
    if (a.labels[k] != a.options.ignore_index && v >= 0 && v < n)
      a.label_logits[k] = capped(Vec<A>{} + load_one(x + v), cap)[0];
  }
  return a.block_start + n >= a.vocabulary;
}

template <typename T, bool plain, bool keep>
RowSums<double> whole_row(T* x, int64_t n, Acc<T> cap) {
  const Acc<T> m = capped(Vec<Acc<T>>{} + row_maximum(x, n), cap)[0];
  RowSums<double> sums = row_sums<T, plain, keep>(x, n, base_of(m), cap);
  sums.maximum = m;
  return sums;
}

// The distinct labels with their logits, which the gradient overwrites later. Returns S of loss.h.
template <typename T>
double read_targets(const LossRows& a, int64_t r, const T* x, std::vector<Target>& targets) {
  using A = Acc<T>;
  const int64_t* labels = a.labels + r * a.bag_size;
  const double* weights = a.label_scale + r * a.scale_stride;
  const A cap = static_cast<A>(a.options.logit_softcap);
  double scale = 0;
  targets.clear();
  for (int64_t i = 0; i < a.bag_size; ++i) {
    if (labels[i] == a.options.ignore_index || weights[i] == 0) continue;
    scale = a.options.objective == Objective::kMceAlt ? weights[0] : scale + weights[i];
    auto target = targets.begin();
    while (target != targets.end() && target->label != labels[i]) ++target;
    if (target == targets.end()) {
      const double z =
          a.partial ? a.label_logits[r * a.bag_size + i] : capped(Vec<A>{} + load_one(x + labels[i]), cap)[0];
      target = targets.insert(target, {labels[i], z, 0.0});
    }
    target->pull += weights[i];
  }
  return scale;
}

// From a row's sums to its loss and the factors of its gradient; the pulls of a set of labels are known only here.
RowTerms<double> finish_row(const LossRows& a, int64_t r, const RowSums<double>& sums, double scale,
                            std::vector<Target>& targets) {
  const double m = sums.maximum, log_sum = std::log(sums.exps);
  const auto positive = [](double x) { return x < 0 ? 0.0 : x; };  // labels are columns: below 0 only by rounding
  double fit = 0;
  if (a.options.objective == Objective::kMceAlt) {
    double best = -std::numeric_limits<double>::infinity(), total = 0;
    for (const Target& t : targets) best = t.logit > best ? t.logit : best;
    for (Target& t : targets) total += t.pull = t.logit == best ? 1.0 : std::exp(t.logit - best);
    for (Target& t : targets) t.pull *= scale / total;
    fit = scale * positive((m - best) + log_sum - std::log(total));
  } else {
    for (const Target& t : targets) fit += t.pull * positive((m - t.logit) + log_sum);
  }
  return row_terms<double>(a.options, sums, log_sum, scale, fit, a.grad_loss ? a.grad_loss[r] : 1.0,
                           a.grad_lse ? a.grad_lse[r] : 0.0);
}

template <typename T, bool plain, bool kept>
void write_gradient(const LossRows& a, T* x, const RowSums<double>& sums, const RowTerms<double>& row,
                    const std::vector<Target>& targets) {
  using A = Acc<T>;
  if (row.nothing) {
    std::memset(x, 0, a.vocabulary * sizeof(T));
    return;
  }
  const A m = static_cast<A>(sums.maximum);
  const double cap = a.options.logit_softcap;
  row_gradient<T, plain, kept>(x, a.vocabulary, m, static_cast<A>(cap), static_cast<A>(row.factor),
                               static_cast<A>(row.uniform));
  for (const Target& t : targets) {
    // From the saved logit and rounded once: subtracting from a probability already rounded to bfloat16 turns
    // p = 0.999 into a zero gradient.
    double gradient = row.factor * std::exp(t.logit - m) - row.pull * t.pull;
    if (t.logit > -std::numeric_limits<double>::infinity()) gradient -= row.uniform;
    if (cap != 0) gradient *= 1 - (t.logit / cap) * (t.logit / cap);
    store_one(x + t.label, static_cast<A>(gradient));
  }
}

template <typename T, bool plain>
void loss_rows_as(const LossRows& a, int64_t begin, int64_t end) {
  constexpr bool kKeep = plain && sizeof(T) > 2;
  const Acc<T> cap = static_cast<Acc<T>>(a.options.logit_softcap);
  std::vector<Target> targets;
  targets.reserve(a.bag_size);
  for (int64_t r = begin; r < end; ++r) {
    T* x = static_cast<T*>(a.logits) + r * a.stride;
    if (a.partial && !add_block<T, plain>(a, r, x)) continue;
    const double scale = read_targets(a, r, x, targets);
    const RowSums<double> sums = a.partial    ? a.partial[r]
                                 : a.gradient ? whole_row<T, plain, kKeep>(x, a.vocabulary, cap)
                                              : whole_row<T, plain, false>(x, a.vocabulary, cap);
    const RowTerms<double> row = finish_row(a, r, sums, scale, targets);
    a.loss[r] = row.loss;
    a.lse[r] = row.lse;
    if (a.gradient) write_gradient<T, plain, kKeep>(a, x, sums, row, targets);
  }
}

template <typename T>
void loss_rows(const LossRows& a, int64_t begin, int64_t end) {
  if (a.options.plain())
    loss_rows_as<T, true>(a, begin, end);
  else
    loss_rows_as<T, false>(a, begin, end);
}

template <typename T>
void column_sum(const ColumnSum& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int kTile = 32;       // vectors: rows are read 1 to 2 KiB at a time, sums stay in the first-level cache
  constexpr int64_t kBlock = 16;  // rows summed apart; sums of blocks are added with compensation (Kahan)
  for (int64_t v = begin; v < end; v += kTile * kLanes) {
    const int64_t width = end - v < kTile * kLanes ? end - v : kTile * kLanes;
    A* out = static_cast<A*>(a.out) + v;
    Vec<A> total[kTile] = {}, lost[kTile] = {};
    for (int64_t start = 0; start < a.rows; start += kBlock) {
      Vec<A> sum[kTile] = {};
      for (int64_t r = start; r < a.rows && r < start + kBlock; ++r) {
        const T* source = static_cast<const T*>(a.source) + r * a.stride + v;
        for (int64_t c = 0; c < width; c += kLanes) {
          sum[c / kLanes] += load(source + c, width - c < kLanes ? width - c : kLanes, A(0));
        }
      }
      for (int c = 0; c * kLanes < width; ++c) {
        const Vec<A> term = sum[c] - lost[c], next = total[c] + term;
        lost[c] = (next - total[c]) - term;
        total[c] = next;
      }
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t count = width - c < kLanes ? width - c : kLanes;
      const Vec<A> before = a.add ? load(out + c, count, A(0)) : Vec<A>{};
      store(out + c, before + total[c / kLanes], count);
    }
  }
}

void accumulate_bfloat16(const Accumulate& a, int64_t begin, int64_t end) {
  const BFloat16* source = static_cast<const BFloat16*>(a.source);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t count = end - i < kLanes ? end - i : kLanes;
    const F32 value = load(source + i, count, 0.0f);
    store(a.out + i, a.add ? load(a.out + i, count, 0.0f) + value : value, count);
  }
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    {gather_sum<float, float>, gather_sum<BFloat16, BFloat16>, gather_sum<Float16, Float16>,
     gather_sum<double, double>},
    {gather_sum<float, float>, gather_sum<BFloat16, float>, gather_sum<Float16, float>, gather_sum<double, double>},
    {gather_sum<float, float>, gather_sum<float, BFloat16>, gather_sum<float, Float16>, gather_sum<double, double>},
    {loss_rows<float>, loss_rows<BFloat16>, loss_rows<Float16>, loss_rows<double>},
    {column_sum<float>, column_sum<BFloat16>, column_sum<Float16>, column_sum<double>},
    accumulate_bfloat16,
};

}  // namespace tst::cpu::TST_ISA
