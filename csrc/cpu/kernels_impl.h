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

template <typename T, typename O>
void gather_sum(const GatherSum& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  static_assert(std::is_same_v<A, Acc<O>>);
  const T* source = static_cast<const T*>(a.source);
  const A scale = static_cast<A>(a.scale);
  for (int64_t r = begin; r < end; ++r) {
    O* out = static_cast<O*>(a.out) + (a.out_rows ? a.out_rows[r] : r) * a.dim;
    const int64_t first = a.begin[r], last = a.end[r];
    const auto row = [&](int64_t k) { return source + (a.index ? a.index[k] : k) * a.dim; };
    int64_t c = 0;
    for (; c + kUnroll * kLanes <= a.dim; c += kUnroll * kLanes) {
      Vec<A> sum[kUnroll] = {};
      for (int64_t k = first; k < last; ++k) {
        for (int u = 0; u < kUnroll; ++u) sum[u] += load(row(k) + c + u * kLanes);
      }
      for (int u = 0; u < kUnroll; ++u) store(out + c + u * kLanes, sum[u] * scale);
    }
    for (; c < a.dim; c += kLanes) {
      const int64_t count = a.dim - c < kLanes ? a.dim - c : kLanes;
      Vec<A> sum = {};
      for (int64_t k = first; k < last; ++k) sum += load(row(k) + c, count, A(0));
      store(out + c, sum * scale, count);
    }
  }
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

// sum_v exp(z_v - m). With `keep`, z_v becomes exp(z_v - m), which spares the second exp; the 16-bit formats would lose
// digits, so they call this without.
template <typename T, bool keep>
double row_sum_exp(T* z, int64_t n, Acc<T> m) {
  using A = Acc<T>;
  constexpr int64_t kBlock = 128 * kLanes;  // each lane adds 128 terms, then moves to float64: lse within 16 eps
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t stop = n - start < kBlock ? n : start + kBlock;
    Vec<A> sum = {};
    int64_t v = start;
    for (; v + kLanes <= stop; v += kLanes) {
      const Vec<A> e = exp_nonpositive(load(z + v) - m);
      if constexpr (keep) store(z + v, e);
      sum += e;
    }
    if (v < stop) {
      const Vec<A> e = exp_nonpositive(load(z + v, stop - v, -std::numeric_limits<A>::infinity()) - m);
      if constexpr (keep) store(z + v, e, stop - v);
      sum += e;
    }
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  }
  return total;
}

// z_v <- factor * exp(z_v - m), or factor * z_v where row_sum_exp kept the exponentials.
template <typename T, bool kept>
void row_softmax(T* z, int64_t n, Acc<T> m, Acc<T> factor) {
  int64_t v = 0;
  for (; v + kLanes <= n; v += kLanes) {
    const Vec<Acc<T>> e = kept ? load(z + v) : exp_nonpositive(load(z + v) - m);
    store(z + v, e * factor);
  }
  if (v < n) {
    const Vec<Acc<T>> x = load(z + v, n - v, Acc<T>(0));
    store(z + v, (kept ? x : exp_nonpositive(x - m)) * factor, n - v);
  }
}

template <typename T>
void loss_rows(const LossRows& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool kKeep = sizeof(T) > 2;
  const int64_t n = a.vocabulary, s = a.bag_size;
  std::vector<A> label_logits(s);
  for (int64_t r = begin; r < end; ++r) {
    T* z = static_cast<T*>(a.logits) + r * a.stride;
    const int64_t* labels = a.labels + r * s;
    double scale = 0;  // S
    for (int64_t i = 0; i < s; ++i) {
      if (labels[i] == a.ignore_index) continue;
      scale += a.position_scale[i];
      label_logits[i] = load_one(z + labels[i]);  // before the row is overwritten
    }
    const A m = row_maximum(z, n);
    const double sum = a.gradient ? row_sum_exp<T, kKeep>(z, n, m) : row_sum_exp<T, false>(z, n, m);
    a.lse[r] = m + std::log(sum);
    a.loss[r] = 0;
    for (int64_t i = 0; i < s; ++i) {
      if (labels[i] == a.ignore_index || a.position_scale[i] == 0) continue;
      // (m - z) + log sum rather than lse - z: lse near 1e4 would cost three digits in float32.
      a.loss[r] += a.position_scale[i] * ((double(m) - label_logits[i]) + std::log(sum));
    }
    if (!a.gradient) continue;
    if (scale == 0) {  // nothing to learn from this row, whatever its logits are
      std::memset(z, 0, n * sizeof(T));
      continue;
    }
    row_softmax<T, kKeep>(z, n, m, static_cast<A>(scale / sum));
    for (int64_t i = 0; i < s; ++i) {
      if (labels[i] == a.ignore_index) continue;
      bool leads = true;  // the first occurrence of a label writes for all
      double coefficient = 0;
      for (int64_t j = 0; j < s; ++j) {
        if (labels[j] != labels[i]) continue;
        leads = leads && j >= i;
        coefficient += a.position_scale[j];
      }
      // From the saved logit and rounded once: subtracting from a probability already rounded to bfloat16 turns
      // p = 0.999 into a zero gradient.
      const double p = std::exp(double(label_logits[i]) - m) / sum;
      if (leads) store_one(z + labels[i], static_cast<A>(scale * p - coefficient));
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
    {loss_rows<float>, loss_rows<BFloat16>, nullptr, loss_rows<double>},
    accumulate_bfloat16,
};

}  // namespace tst::cpu::TST_ISA
