"""The ways to run a layer, and their comparison."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


# Relative to the largest compared entry, or to 1 if all entries are smaller. Two ways to sum the
# same products differ by a few units in the last place, which are 2^-24, 2^-11, 2^-8 and 2^-53.
TOLERANCE = {"float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2, "float64": 1e-12}

# The room of caches, more than any case of a law needs.
CAPACITY = 128


@functools.cache
def _compiler_options() -> dict[str, Any]:
    """Selects the compiler options that the installed XLA knows, since they change between
    versions."""
    options = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


def quick(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `run` by a `jax.jit` that compiles quickly to slow code, because laws spend far more
    time compiling than running."""

    @functools.cache
    def compiled() -> Callable[..., Any]:  # The options are found at the first call.
        return jax.jit(run, compiler_options=_compiler_options())

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        return compiled()(*args)

    return call


def scan_uncompiled(layer: Any, x: Any, state: Any, reset: Any = None, length: Any = None) -> Any:
    return layer.scan(x, state, reset=reset, length=length)


scan = quick(scan_uncompiled)


def step_uncompiled(layer: Any, x: Any, state: Any) -> Any:
    return layer.step(x, state)


step = quick(step_uncompiled)


def fold(layer: Any, x: Any, state: Any, reset: Any = None) -> Any:
    """Runs `step` on one token after another, from the empty past wherever `reset` is true."""
    y = []
    for t in range(len(x)):
        if reset is not None and reset[t]:
            state = layer.init_state(max_len=CAPACITY)
        y_t, state = step(layer, x[t], state)
        y.append(np.asarray(y_t))
    return np.stack(y), state


def fold_in_jax(layer: Any, state: Any, x: Any) -> Any:
    """Runs `fold` as one differentiable function."""
    state, y = lax.scan(lambda state, x_t: layer.step(x_t, state)[::-1], state, x)
    return y, state


def assert_same_structure(got: Any, want: Any) -> None:
    """Asserts equal structures, dtypes and shapes."""
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise AssertionError(
            f"The structures differ: {jax.tree.structure(got)} and {jax.tree.structure(want)}."
        )
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in pairs:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise AssertionError(
                f"{_place(path)} has the dtype {a.dtype} and the shape {a.shape}, but "
                f"{b.dtype} and {b.shape} in the other way to compute it."
            )


def assert_close(got: Any, want: Any, dtype: str, *, factor: float = 1.0) -> None:
    """Asserts equal structures, dtypes and shapes, and values equal up to `factor` times the
    tolerance of `dtype`."""
    assert_same_structure(got, want)
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if jax.tree_util.keystr(path).endswith(".angle"):  # Angles are equal modulo whole turns.
            a = a - 2 * np.pi * np.round((a - b) / (2 * np.pi))
        allowed = TOLERANCE[dtype] * factor * max(1.0, np.abs(b).max(initial=0.0))
        close = np.isclose(a, b, rtol=0, atol=allowed, equal_nan=True)
        if not close.all():
            first = tuple(int(i) for i in np.argwhere(~close)[0])
            raise AssertionError(
                f"{_place(path)} differs in {np.sum(~close)} of {close.size} numbers: at {first} "
                f"it is {a[first]:.6g}, but {b[first]:.6g} in the other way to compute it."
            )


def _place(path: Any) -> str:
    """Names an entry of `(outputs, state)`, or of any other pytree."""
    return f"The entry {jax.tree_util.keystr(path) or 'compared'}"


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
