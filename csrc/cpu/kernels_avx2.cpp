// The kernels with AVX2. The standard headers come first: a template of theirs instantiated under these options could
// be the copy that the linker keeps for the whole program.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TST_ISA isa_avx2
#define TST_VECTOR_BYTES 32
#include "kernels_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
