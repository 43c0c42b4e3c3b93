"""The facts of a run of `compare.py`: the processor, its measured limits, and the versions."""

import datetime
import os
import platform

import jax.numpy as jnp
from _common import compiled, cores, cpu, instructions, limits, medians, product_limits


def facts(*, quick: bool) -> dict[str, object]:
    """Measures the machine through XLA.

    **Arguments:**

    - `quick`: whether to use small sizes.

    **Returns:** the processor, and the measured limits: `memory` in bytes per second, `float32`,
    `bfloat16` and `int8` in operations per second of products of matrices, and `exponentials` per
    second.
    """
    memory, float32 = limits(quick=quick)
    count = 1 << (16 if quick else 22)
    exponentials, _ = compiled(jnp.exp, jnp.linspace(-1, 0, count, dtype=jnp.float32))
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu(),
        "cores": cores(),
        "instructions": instructions(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "memory": memory,
        "float32": float32,
        **product_limits(jnp.bfloat16, jnp.int8, quick=quick),
        "exponentials": count / medians({"": exponentials})[""],
    }
