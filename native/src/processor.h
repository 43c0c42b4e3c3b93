// Whether the kernels for x86-64 are compiled.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define MAMBA_EQX_X86 1
#endif
