// The kernels with the compiler's baseline: SSE2 on x86-64, NEON on aarch64.
#define TST_ISA isa_default
#define TST_VECTOR_BYTES 16
#include "kernels_impl.h"
