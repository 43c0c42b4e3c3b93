// The products of matrices with panels, for x86-64 with AVX2 and FMA.
#include "processor.h"

#ifdef MAMBA_EQX_X86
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define PANEL_PRODUCT panel_product_avx2
#include "matmul_kernels.inc"
#endif
