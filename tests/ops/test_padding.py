"""Padding reaches no gradient of any op, even if all its inputs are NaN."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from mamba_eqx import ops
from tests.support.cases import quick
from tests.support.ops import assert_close


pytestmark = pytest.mark.usefixtures("compile_fast")


SEQ, REAL = 7, 4
HEADS, GROUPED, STATE = (4, 3), (2, 5), (5, 4, 3)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).uniform(0.1, 1, shape))


Op = Callable[..., PyTree]
slow = pytest.mark.slow

# Each op as a function of its inputs per token, its other inputs, and the options of a sequence.
OPS: dict[str, tuple[Op, list[jax.Array], list[jax.Array]]] = {
    "causal_conv1d": (
        lambda x, w, b, state, **options: ops.causal_conv1d(x, w, b, state=state, **options),
        [draw(SEQ, 3)],
        [draw(4, 3), draw(3), draw(3, 3)],
    ),
    "attention": (
        lambda q, k, v, **options: ops.attention(q, k, v, **options),
        [draw(SEQ, *HEADS), draw(SEQ, 2, 3), draw(SEQ, 2, 3)],
        [],
    ),
    "attention_window": (
        lambda q, k, v, **options: ops.attention(q, k, v, window=2, block_size=2, **options),
        [draw(SEQ, *HEADS), draw(SEQ, 2, 3), draw(SEQ, 2, 3)],
        [],
    ),
}
for method in ("sequential", "associative"):
    OPS[f"linear_recurrence_{method}"] = (
        lambda a, b, method=method, **options: ops.linear_recurrence(
            a, b, method=method, **options
        ),
        [draw(SEQ, 3), draw(SEQ, 3)],
        [],
    )
for method in ("chunked", "sequential", "associative"):
    OPS[f"selective_scan_{method}"] = (
        lambda x, dt, B, C, A, D, state, method=method, **options: ops.selective_scan(
            x, dt, -A, B, C, D, state=state, method=method, **options
        ),
        [draw(SEQ, 3), draw(SEQ, 3), draw(SEQ, 2), draw(SEQ, 2)],
        [draw(3, 2), draw(3), draw(2, 3)],
    )
for method in ("chunked", "sequential"):
    OPS[f"ssd_{method}"] = (
        lambda x, dt, B, C, A, D, state, method=method, **options: ops.ssd(
            x, dt, -A, B, C, D, state=state, method=method, **options
        ),
        [draw(SEQ, *HEADS), draw(SEQ, 4), draw(SEQ, *GROUPED), draw(SEQ, *GROUPED)],
        [draw(4), draw(4), draw(*STATE)],
    )
    OPS[f"mamba3_{method}"] = (
        lambda x, dt, A, B, C, trap, angles, D, bias, method=method, **options: ops.mamba3(
            x,
            dt,
            -A,
            B,
            C,
            D,
            trap=trap,
            angles=angles,
            B_bias=bias,
            C_bias=bias,
            interleaved=True,
            method=method,
            **options,
        ),
        [
            draw(SEQ, *HEADS),
            draw(SEQ, 4),
            draw(SEQ, 4),
            draw(SEQ, 1, *GROUPED),
            draw(SEQ, 1, *GROUPED),
            draw(SEQ, 4),
            draw(SEQ, 2),
        ],
        [draw(4), draw(4, 1, 5)],
    )

QUICK = ("causal_conv1d", "attention", "selective_scan_chunked")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=slow) for name in OPS]
)
def test_padding_reaches_no_gradient(name: str):
    op, tokens, others = OPS[name]
    reset = jnp.arange(SEQ) == 2

    def gradient(run: Callable[[list[jax.Array], list[jax.Array]], Any], *inputs: Any) -> Any:
        def loss(*inputs: Any) -> jax.Array:
            out = jax.tree.leaves(run(*inputs))
            floats = [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jnp.floating)]
            return sum((jnp.sum(jnp.sin(leaf)) for leaf in floats), jnp.zeros(()))

        return quick(jax.grad(loss, argnums=(0, 1)))(*inputs)

    def padded(tokens: list[jax.Array], others: list[jax.Array]) -> Any:
        y, state = op(*tokens, *others, reset=reset, length=REAL)
        return y[:REAL], state

    def alone(tokens: list[jax.Array], others: list[jax.Array]) -> Any:
        return op(*(t[:REAL] for t in tokens), *others, reset=reset[:REAL])

    for_tokens, for_others = gradient(padded, [t.at[REAL:].set(jnp.nan) for t in tokens], others)
    assert_close((for_tokens, for_others), gradient(alone, tokens, others), 1e-5)
