// Buffers in the storage formats, read and written as double.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace tst::cpu {

// Whether each kernel runs on a few sizes instead of all: under a sanitizer, which takes 20 times as long, and on an
// emulated processor (TST_ONCE). A wrong address, a race or an instruction of another set does not depend on numbers.
inline bool once() {
#if defined(TST_ONCE)
  return true;
#else
  return std::getenv("TST_ONCE") != nullptr;
#endif
}

// Storage formats as the tests see them: bit patterns converted one at a time, by rules written independently of the
// kernels' (round half to even by remainder).
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fc0;
  const uint32_t low = bits & 0xffff, high = bits >> 16;
  return static_cast<uint16_t>(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float from_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  }
  return static_cast<float>(bits & 0x8000 ? -value : value);
}

inline uint16_t to_f16(float value) {  // the nearest of all finite halves, ties to the even pattern
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

inline double eps(DType dtype) {
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

}  // namespace tst::cpu
