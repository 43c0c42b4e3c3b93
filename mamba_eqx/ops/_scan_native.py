"""The passes of the selective scan in the kernels of mamba-eqx-native."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool

from ._native import NativeScan, is_for_this_process, kernels_accept, native_scan
from ._scan_chunks import Chunks, Inputs, Residuals, State, Tokens, pull, run_chunks


def is_native(tokens: Tokens) -> bool:
    """Returns whether the kernels run a scan: for float32, if the package is installed, and for
    arrays that are not distributed over devices and have no symbolic sizes.

    **Arguments:**

    - `tokens`: chunks of tokens.
    """
    return (
        tokens.x.dtype == jnp.float32
        and kernels_accept(jax.tree.leaves(tokens))
        and native_scan() is not None
    )


def native_chunks(
    tokens: Tokens, At: State, h: State, *, keep_starts: bool
) -> tuple[Chunks, State, Array]:
    """Computes `run_chunks` in the kernels.

    **Arguments:**

    - `tokens`, `At`, `h`: those of `run_chunks`, in float32.
    - `keep_starts`: whether the states at the starts of the chunks are needed.

    **Returns:**

    The outputs, the last state, and the states at the starts of the chunks, or no such states.
    """
    *arrays, reset = tokens
    reset = _reset_array(reset, tokens)
    y, end, starts = _forward_p.bind(*arrays, At, reset, h, keep_starts=keep_starts)
    return y, end, starts


def native_pull(residuals: Residuals, cotangents: tuple[Chunks, State]) -> Inputs:
    """Computes `pull` in the kernels."""
    tokens, At, starts = residuals
    *arrays, reset = tokens
    bars = _reverse_p.bind(*arrays, At, _reset_array(reset, tokens), starts, *cotangents)
    x, dt, B, C, At_bar, h_bar = bars
    return Tokens(x, dt, B, C, reset=None), At_bar, h_bar


def _reset_array(reset: Bool[Array, "chunks chunk"] | None, tokens: Tokens) -> Array:
    """Returns an array without elements for `None`, which no argument of a primitive can be."""
    return jnp.zeros((0, tokens.x.shape[1]), bool) if reset is None else reset


def _reset_or_none(reset: Array) -> Array | None:
    return reset if reset.size else None


# A custom batching rule lets the kernels share arrays among the sequences of a batch rather than
# repeat them, and a lowering rule of its own can see what a program is compiled for.


def _forward(
    x: Array, dt: Array, B: Array, C: Array, At: Array, reset: Array, h: Array, *, keep_starts: bool
) -> tuple[Array, ...]:
    """Computes in operations of JAX what `_forward_p` stands for, for one sequence."""
    y, end, starts = run_chunks(Tokens(x, dt, B, C, _reset_or_none(reset)), At, h)
    return y, end, starts if keep_starts else starts[:0]


def _reverse(
    x: Array,
    dt: Array,
    B: Array,
    C: Array,
    At: Array,
    reset: Array,
    starts: Array,
    y_bar: Array,
    h_bar: Array,
) -> tuple[Array, ...]:
    """Computes in operations of JAX what `_reverse_p` stands for, for one sequence."""
    residuals = Residuals(Tokens(x, dt, B, C, _reset_or_none(reset)), At, starts)
    tokens_bar, At_bar, start_bar = pull(residuals, (y_bar, h_bar))
    return (*tokens_bar[:4], At_bar, start_bar)


def _kernels() -> NativeScan:
    kernels = native_scan()
    assert kernels is not None
    return kernels


def _forward_shapes(
    x: tuple[int, ...], _: tuple[int, ...], At: tuple[int, ...], *, keep_starts: bool
) -> Sequence[tuple[int, ...]]:
    return x, At, (x[0] if keep_starts else 0, *At)


def _reverse_shapes(
    x: tuple[int, ...], B: tuple[int, ...], At: tuple[int, ...]
) -> Sequence[tuple[int, ...]]:
    return x, x, B, B, At, At


# The numbers of axes of the arguments for one sequence. Batches have more in front of them, whose
# sizes are those of the batch, or 1.
_FORWARD_RANKS = (3, 3, 3, 3, 2, 2, 2)
_REVERSE_RANKS = (3, 3, 3, 3, 2, 2, 3, 3, 2)


def _over_batch(
    function: Callable[..., Sequence[Array]], ranks: tuple[int, ...], *args: Array
) -> Sequence[Array]:
    """Calls a function of one sequence with batches."""
    if args[0].ndim == ranks[0]:
        return function(*args)
    run = partial(_over_batch, function, ranks)
    sizes = [arg.shape[0] for arg in args]
    mapped = [export.is_symbolic_dim(size) or size != 1 for size in sizes]
    args = tuple(a if m else a[0] for a, m in zip(args, mapped, strict=True))
    if not any(mapped):
        return [result[None] for result in run(*args)]
    return jax.vmap(run, in_axes=tuple(0 if m else None for m in mapped))(*args)


def _primitive(
    name: str,
    ranks: tuple[int, ...],
    results: Callable[..., Sequence[tuple[int, ...]]],
    reference: Callable[..., Sequence[Array]],
    native: Callable[..., Sequence[Array]],
) -> Primitive:
    """Returns a primitive with several results.

    **Arguments:**

    - `name`: its name.
    - `ranks`: the number of axes of every argument for one sequence.
    - `results`: the shapes of the results for one sequence, as a function of those of `x`, `B` and
        `At`.
    - `reference`: the function for one sequence, in operations of JAX.
    - `native`: the same function for sequences with any number of batch axes, in the kernels.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def in_jax(*args: Array, **options: Any) -> Sequence[Array]:
        return _over_batch(partial(reference, **options), ranks, *args)

    def shapes(*args: ShapedArray, **options: Any) -> list[ShapedArray]:
        # The sizes of a batch may be symbolic, which NumPy cannot broadcast.
        batches = (a.shape[: a.ndim - rank] for a, rank in zip(args, ranks, strict=True))
        is_batch = lambda size: export.is_symbolic_dim(size) or size != 1
        batch = [next(filter(is_batch, sizes), 1) for sizes in zip(*batches, strict=True)]
        x, _, B, _, At, *_ = (a.shape[a.ndim - rank :] for a, rank in zip(args, ranks, strict=True))
        # Tracing the reference for them would take longer than all else.
        return [ShapedArray((*batch, *s), jnp.float32) for s in results(x, B, At, **options)]

    def jvp(
        primals: Sequence[Array], tangents: Sequence[Any], **options: Any
    ) -> tuple[Sequence[Array], Sequence[Array]]:
        is_float = [jnp.issubdtype(p.dtype, jnp.floating) for p in primals]

        def run(*floats: Array) -> Sequence[Array]:
            rest = iter(floats)
            pairs = zip(primals, is_float, strict=True)
            return in_jax(*(next(rest) if f else p for p, f in pairs), **options)

        floats = [p for p, f in zip(primals, is_float, strict=True) if f]
        dots = [ad.instantiate_zeros(t) for t, f in zip(tangents, is_float, strict=True) if f]
        return jax.jvp(run, floats, dots)

    def batched(
        args: Sequence[Array], axes: Sequence[int | None], **options: Any
    ) -> tuple[Sequence[Array], list[int]]:
        pairs = zip(args, axes, strict=True)
        moved = [a[None] if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in pairs]
        results = primitive.bind(*moved, **options)
        return results, [0] * len(results)

    def on_cpu(context: Any, *args: Any, **options: Any) -> Any:
        run = native if is_for_this_process(context) else in_jax
        return mlir.lower_fun(run, multiple_results=True)(context, *args, **options)

    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("keep_starts",)))
    primitive.def_abstract_eval(shapes)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(in_jax, multiple_results=True))
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    return primitive


_forward_p = _primitive(
    "mamba_eqx_selective_scan",
    _FORWARD_RANKS,
    _forward_shapes,
    _forward,
    lambda *args, **options: _kernels().forward(*args, **options),
)
_reverse_p = _primitive(
    "mamba_eqx_selective_scan_reverse",
    _REVERSE_RANKS,
    _reverse_shapes,
    _reverse,
    lambda *args: _kernels().reverse(*args),
)
