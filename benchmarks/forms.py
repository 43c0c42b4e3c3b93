"""Measures several implementations of the same operation; the package uses the first of each.

    python benchmarks/forms.py [--quick]

Times are in milliseconds, for one sequence and for batches of one and four under `jax.vmap`. The
shape is mamba-130m's, in float32. docs/speed.md explains the differences.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import Competitors, arguments, compiled, medians, print_facts, print_table
from jax import lax
from scan import D_STATE, inputs

import mamba_eqx as mbx


Form = Callable[..., jax.Array]
Token = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""`x`, `dt`, `B` and `C` of one token."""


class Case(NamedTuple):
    """An operation, with its implementations by name."""

    args: tuple[jax.Array, ...]
    """The arguments of one sequence."""

    axes: tuple[int | None, ...]
    """The batch axes of `args`, as for `jax.vmap`."""

    forms: dict[str, Form]
    """The implementations. The package uses the first."""


def sums(d_inner: int, seq: int) -> Case:
    """Returns loops over time that differ only in the sum over the state."""

    def chain(t: jax.Array) -> jax.Array:
        total = t[0]
        for n in range(1, D_STATE):
            total = total + t[n]
        return total

    def loop(add: Callable[[jax.Array], jax.Array]) -> Form:
        def run(
            x: jax.Array, dt: jax.Array, At: jax.Array, B: jax.Array, C: jax.Array
        ) -> jax.Array:
            def step(h: jax.Array, token: Token) -> tuple[jax.Array, jax.Array]:
                x, dt, B, C = token
                h = jnp.exp(dt * At) * h + B[:, None] * (dt * x)
                return h, add(C[:, None] * h)

            return lax.scan(step, jnp.zeros_like(At), (x, dt, B, C))[1]

        return run

    def channels_first(
        x: jax.Array, dt: jax.Array, At: jax.Array, B: jax.Array, C: jax.Array
    ) -> jax.Array:
        def step(h: jax.Array, token: Token) -> tuple[jax.Array, jax.Array]:
            x, dt, B, C = token
            h = jnp.exp(dt[:, None] * At.T) * h + (dt * x)[:, None] * B
            return h, jnp.sum(h * C, axis=1)

        return lax.scan(step, jnp.zeros_like(At.T), (x, dt, B, C))[1]

    x, dt, A, B, C, _, _ = inputs(d_inner, seq)
    return Case(
        (x, dt, A.T, B, C),
        (0, 0, None, 0, 0),
        {
            "a chain of additions": loop(chain),
            "`jnp.sum(t, axis=0)`": loop(lambda t: jnp.sum(t, axis=0)),
            "state `(d_inner, d_state)`, `jnp.sum(t, axis=1)`": channels_first,
        },
    )


def products(d_inner: int, seq: int) -> Case:
    """Returns a projection of all tokens."""
    x = jr.normal(jr.key(0), (seq, d_inner // 2))
    W = jr.normal(jr.key(1), (2 * d_inner, d_inner // 2))
    # The elementwise operation after the product needs its result in this order. A product alone
    # would hide the copy that some forms need.
    return Case(
        (x, W),
        (0, None),
        {
            "`x @ W.T`": lambda x, W: jnp.tanh(x @ W.T),
            "`jax.vmap(lambda x: W @ x)(x)`": lambda x, W: jnp.tanh(jax.vmap(lambda x: W @ x)(x)),
        },
    )


def convolutions(d_inner: int, seq: int) -> Case:
    """Returns a causal depthwise convolution."""

    def grouped(x: jax.Array, w: jax.Array) -> jax.Array:
        lag = w.shape[0] - 1
        return lax.conv_general_dilated(
            jnp.pad(x, ((lag, 0), (0, 0)))[None],
            w[:, None, :],
            (1,),
            "VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=x.shape[1],
        )[0]

    x = jr.normal(jr.key(0), (seq, d_inner))
    w = jr.normal(jr.key(1), (4, d_inner))
    return Case(
        (x, w),
        (0, None),
        {
            "shifted multiply-adds": lambda x, w: mbx.ops.causal_conv1d(x, w, None)[0],
            "`lax.conv_general_dilated`": grouped,
        },
    )


def main() -> None:
    options = arguments(__doc__)
    print_facts("Forms", quick=options.quick)
    d_inner, seq = (64, 32) if options.quick else (1536, 512)
    cases = {
        "scan, sum over d_state": sums(d_inner, seq),
        "projection": products(d_inner, seq),
        "convolution": convolutions(d_inner, seq),
    }
    rows = []
    for what, (args, axes, forms) in cases.items():
        results = [np.asarray(form(*args)) for form in forms.values()]
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], rtol=1e-3, atol=1e-3)
        times: list[dict[str, float]] = []
        for batch in (None, 1, 4):
            runs: Competitors = {}
            for name, form in forms.items():
                runs[name] = compiled(*lifted(form, args, axes, batch))[0]
            times.append(medians(runs))
        rows += [(what, name, *(1e3 * seconds[name] for seconds in times)) for name in forms]
    print(f"Milliseconds, {seq} tokens, d_inner {d_inner}, d_state {D_STATE}:\n")
    print_table(("", "form", "one sequence", "`vmap` over 1", "`vmap` over 4"), rows)


def lifted(
    form: Form, args: tuple[jax.Array, ...], axes: tuple[int | None, ...], batch: int | None
) -> tuple[Form, *tuple[jax.Array, ...]]:
    """Returns a form and its arguments, with a batch axis unless `batch` is `None`."""
    if batch is None:
        return form, *args
    stacked = (
        t if axis is None else jnp.stack([t] * batch) for t, axis in zip(args, axes, strict=True)
    )
    return jax.vmap(form, in_axes=axes), *stacked


if __name__ == "__main__":
    main()
