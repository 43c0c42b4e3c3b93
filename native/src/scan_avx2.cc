// The selective scan for x86-64 with AVX2 and FMA.
#include "processor.h"

#ifdef MAMBA_EQX_X86
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define LARGER(a, b) (Floats)(_mm256_max_ps((__m256)(a), (__m256)(b)))
#define SMALLER(a, b) (Floats)(_mm256_min_ps((__m256)(a), (__m256)(b)))
#define FORWARD scan_forward_avx2
#define REVERSE scan_reverse_avx2
#include "scan_kernels.inc"
#endif
