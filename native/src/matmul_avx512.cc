// The products of matrices with panels, for x86-64 with AVX-512.
#include "processor.h"

#ifdef MAMBA_EQX_X86
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#define PANEL_PRODUCT panel_product_avx512
#include "matmul_kernels.inc"
#endif
