"""What the processor can do, as far as the operating system tells."""

from functools import cache
from pathlib import Path


@cache
def multiplies_bfloat16() -> bool:
    """Returns whether the processor has instructions for matrix products in bfloat16, for which
    XLA's CPU backend has kernels: AMX or AVX-512. The answer is false where the
    system is not Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags.split())
