"""Measures matrix products in every dtype and form, in GFLOP/s (GOP/s for int8).

    python benchmarks/products.py [--quick]

The products are those of a linear map with weight `(out, in)`: `y = x W^T`, and of its reverse
pass `dx = dy W` and `dW = dy^T x`. On a processor with AMX or AVX-512 bfloat16 instructions, the
fast forms in bfloat16 take a half to a sixth of the time of float32; they have two bfloat16 factors
that are not transposed, and a float32 result. On other processors they are slower than float32.
`mamba_eqx.ops.narrow_product` chooses by the processor; the table shows whether it chooses well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _common import Competitors, arguments, compiled, medians, print_facts, print_table
from jax import lax
from jax.typing import DTypeLike

import mamba_eqx as mbx


Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""A function of `x`, `W` and `dy`."""

Y, DX, DW = "y", "dx", "dW"


def dot(a: jax.Array, b: jax.Array, axes: str, result: DTypeLike) -> jax.Array:
    """Multiplies two matrices. `axes` are the axes that are summed over, such as `"11"`."""
    contract = (((int(axes[0]),), (int(axes[1]),)), ((), ()))
    return lax.dot_general(a, b, contract, preferred_element_type=result)


def copied_transpose(t: jax.Array) -> jax.Array:
    """Transposes a matrix in memory, where XLA would rather change the layout."""
    return jnp.squeeze(lax.optimization_barrier(t.T[..., None]), -1)


def rounded(t: jax.Array) -> jax.Array:
    """Rounds to bfloat16 by arithmetic on the bits, which XLA cannot fold into a product."""
    bits = lax.bitcast_convert_type(t, jnp.uint32)
    upper = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def package(t: jax.Array, dy: jax.Array, pull: Callable[..., jax.Array]) -> jax.Array:
    """Returns a derivative of the package's product."""
    return jax.linear_transpose(pull, t)(dy)[0]


def forms(dtype: DTypeLike) -> dict[tuple[str, str], Form]:
    """Returns the products of a dtype by what they compute and how they are written."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        return {
            (Y, "`dot`, last axes, result int32"): lambda x, W, dy: dot(x, W, "11", jnp.int32),
            (DX, "`dot`, result int32"): lambda x, W, dy: dot(dy, W, "10", jnp.int32),
        }
    found: dict[tuple[str, str], Form] = {
        (Y, "`x @ W.T`"): lambda x, W, dy: x @ W.T,
        (DX, "`dy @ W`"): lambda x, W, dy: dy @ W,
        (DW, "`dy.T @ x`"): lambda x, W, dy: dy.T @ x,
        (DW, "`(x.T @ dy).T`"): lambda x, W, dy: (x.T @ dy).T,
        (DW, "`dy` transposed in memory"): lambda x, W, dy: dot(
            copied_transpose(dy), x, "10", dtype
        ),
    }
    if dtype == jnp.float32:
        return found
    wide = jnp.float32
    product = mbx.ops.narrow_product
    found |= {
        (Y, "`dot`, last axes"): lambda x, W, dy: dot(x, W, "11", dtype),
        (Y, "`x @ W.T`, result float32"): lambda x, W, dy: jnp.matmul(
            x, W.T, preferred_element_type=wide
        ),
        (Y, "`dot`, last axes, result float32"): lambda x, W, dy: dot(x, W, "11", wide),
        (Y, "the same, converted"): lambda x, W, dy: dot(x, W, "11", wide).astype(dtype),
        (DX, "`dot`, result float32"): lambda x, W, dy: dot(dy, W, "10", wide),
        (DX, "the same, converted"): lambda x, W, dy: dot(dy, W, "10", wide).astype(dtype),
        (DX, "`W` transposed in memory, result float32"): lambda x, W, dy: dot(
            dy, copied_transpose(W), "11", wide
        ),
        (DW, "`dot`, first axes, result float32"): lambda x, W, dy: dot(dy, x, "00", wide),
        (DW, "`dy` transposed in memory, result float32"): lambda x, W, dy: dot(
            copied_transpose(dy), x, "10", wide
        ),
        (DW, "`dy` and `x` transposed in memory, result float32"): lambda x, W, dy: dot(
            copied_transpose(dy), copied_transpose(x), "11", wide
        ),
        (Y, "`narrow_product`"): lambda x, W, dy: product(x, W),
        (Y, "`narrow_product`, result float32"): lambda x, W, dy: product(x, W, dtype=wide),
        (DX, "`narrow_product`"): lambda x, W, dy: package(x, dy, lambda x: product(x, W)),
        (DW, "`narrow_product`"): lambda x, W, dy: package(W, dy, lambda W: product(x, W)),
    }
    if dtype == jnp.bfloat16:
        found |= {
            (Y, "`dot`, last axes, rounded by integers"): lambda x, W, dy: rounded(
                dot(x, W, "11", wide)
            ),
            (DX, "`dot`, rounded by integers"): lambda x, W, dy: rounded(dot(dy, W, "10", wide)),
            (DW, "`dy` transposed in memory, rounded by integers"): lambda x, W, dy: rounded(
                dot(copied_transpose(dy), x, "10", wide)
            ),
        }
    return found


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8)


def matrices(dtype: DTypeLike, rows: int, ins: int, outs: int) -> tuple[jax.Array, ...]:
    """Returns `x`, `W` and `dy` with small integers, whose products are exact in float32."""
    keys = jr.split(jr.key(0), 3)
    shapes = (rows, ins), (outs, ins), (rows, outs)
    return tuple(
        jr.randint(key, shape, -2, 3).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    )


def main() -> None:
    options = arguments(__doc__)
    print_facts("Products", quick=options.quick)
    widths = [(32, 48)] if options.quick else [(768, 3072), (1536, 768), (768, 50280)]
    counts = [1, 8, 16] if options.quick else [1, 8, 32, 512]
    for ins, outs in widths:
        table: dict[tuple[str, str, str], list[float]] = {}
        for rows in counts:
            runs: dict[tuple[str, str, str], Callable[[], jax.Array]] = {}
            exact: dict[str, np.ndarray] = {}
            for dtype in DTYPES:
                case = matrices(dtype, rows, ins, outs)
                for (what, name), form in forms(dtype).items():
                    run = compiled(form, *case)[0]
                    runs[what, jnp.dtype(dtype).name, name] = run
                    result = np.asarray(run(), np.float64)
                    want = exact.setdefault(what, result)
                    # The first is float32. Results in 16 bits are rounded.
                    np.testing.assert_allclose(result, want, rtol=2**-8, atol=1e-6)
            named: Competitors = {" ".join(key): run for key, run in runs.items()}
            seconds = medians(named, repeats=5, budget=1)
            for key in runs:
                speed = 2e-9 * rows * ins * outs / seconds[" ".join(key)]
                table.setdefault(key, []).append(speed)
        print(f"`W` of shape ({outs}, {ins}), GFLOP/s by the number of rows:\n")
        order = sorted(table, key=lambda key: (Y, DX, DW).index(key[0]))
        print_table(
            ("", "dtype", "form", *(f"{rows} rows" for rows in counts)),
            [(*key, *table[key]) for key in order],
        )


if __name__ == "__main__":
    main()
