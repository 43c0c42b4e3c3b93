// The products of matrices with panels, for x86-64 with AVX-512 BF16.
#include "processor.h"

#ifdef MAMBA_EQX_X86
#include <immintrin.h>
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bf16,avx2,fma")))
#define DOT_PAIRS(a, b, sum) \
  (Floats) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(__m512i)(a), (__m512bh)(__m512i)(b))
#define PANEL_PRODUCT panel_product_avx512_bf16
#include "matmul_kernels.inc"
#endif
