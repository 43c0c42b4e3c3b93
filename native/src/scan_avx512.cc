// The selective scan for x86-64 with AVX-512.
#include "processor.h"

#ifdef MAMBA_EQX_X86
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#define LARGER(a, b) (Floats)(_mm512_max_ps((__m512)(a), (__m512)(b)))
#define SMALLER(a, b) (Floats)(_mm512_min_ps((__m512)(a), (__m512)(b)))
#define FORWARD scan_forward_avx512
#define REVERSE scan_reverse_avx512
#include "scan_kernels.inc"
#endif
