import jax
import jax.numpy as jnp
import numpy as np


_FORWARD = "mamba_eqx_native_selective_scan"
_REVERSE = "mamba_eqx_native_selective_scan_reverse"

# The channels are divided into at most this number of groups, whose sums are added in order. All
# threads are busy if the groups of all sequences are several times as many.
_GROUPS = 8

# The channels that a kernel computes together.
_UNIT = 64


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    A: jax.Array,
    reset: jax.Array,
    start: jax.Array,
    *,
    keep_starts: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Computes the selective state-space model of Mamba in float32,

    $$h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t x_t, \qquad y_t = C_t^\top h_t.$$

    The function runs on CPUs only, under `jax.jit` and in loops, but it has no derivatives and no
    batching rule: all arrays may have the same number of batch axes in front, whose sizes are those
    of the batch or 1.

    **Arguments:**

    - `x`, `dt`: the inputs and the step sizes, of shape `(chunks, chunk, d_inner)`.
    - `B`, `C`: the input and output maps, of shape `(chunks, chunk, d_state)`.
    - `A`: the negated rates of decay, of shape `(d_state, d_inner)`.
    - `reset`: true where a token forgets everything before it, of shape `(chunks, chunk)`; of shape
        `(0, chunk)` if no token does.
    - `start`: the state before the first token, of shape `(d_state, d_inner)`.
    - `keep_starts`: whether the states before the chunks are needed.

    **Returns:**

    The outputs, of shape `(chunks, chunk, d_inner)`; the state after the last token, of shape
    `(d_state, d_inner)`; and the states before the chunks, of shape `(chunks, d_state, d_inner)`,
    or `(0, d_state, d_inner)` if they are not needed.

    **Raises:** `ValueError` if the shapes or dtypes of the arguments do not fit together.
    """
    batch = _batch(x, dt, B, C, A, reset, [("start", start, 2)])
    (chunks, chunk, d_inner), d_state = x.shape[-3:], A.shape[-2]
    results = _results(
        batch,
        (chunks, chunk, d_inner),
        (d_state, d_inner),
        (chunks if keep_starts else 0, d_state, d_inner),
    )
    y, end, starts = jax.ffi.ffi_call(_FORWARD, results)(x, dt, B, C, A, reset, start)
    return y, end, starts


def selective_scan_reverse(
    x: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    A: jax.Array,
    reset: jax.Array,
    starts: jax.Array,
    y_bar: jax.Array,
    end_bar: jax.Array,
) -> tuple[jax.Array, ...]:
    """Computes the derivatives of a loss by the arguments of `selective_scan`.

    The sums over channels are added in an order that does not depend on the threads.

    **Arguments:**

    - `x`, `dt`, `B`, `C`, `A`, `reset`: those of `selective_scan`.
    - `starts`: the states before the chunks, which it returned.
    - `y_bar`, `end_bar`: the derivatives of the loss by the outputs and by the state after the last
        token, of their shapes.

    **Returns:**

    The derivatives by `x`, `dt`, `B`, `C`, `A` and `start`, each of the shape of the argument with
    all batch axes.

    **Raises:** `ValueError` if the shapes or dtypes of the arguments do not fit together.
    """
    others = [("starts", starts, 3), ("y_bar", y_bar, 3), ("end_bar", end_bar, 2)]
    batch = _batch(x, dt, B, C, A, reset, others)
    (chunks, chunk, d_inner), d_state = x.shape[-3:], A.shape[-2]
    inputs, maps, states = (chunks, chunk, d_inner), (chunks, chunk, d_state), (d_state, d_inner)
    groups = max(1, min(_GROUPS, (d_inner + _UNIT - 1) // _UNIT))
    # The last result is memory for the sums of all groups but the first.
    sums = (groups - 1, 2, *maps)
    results = _results(batch, inputs, inputs, maps, maps, states, states, sums)
    call = jax.ffi.ffi_call(_REVERSE, results)
    return tuple(call(x, dt, B, C, A, reset, starts, y_bar, end_bar)[:-1])


def _results(batch: tuple[int, ...], *shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((*batch, *shape), jnp.float32) for shape in shapes]


def _batch(
    x: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    A: jax.Array,
    reset: jax.Array,
    others: list[tuple[str, jax.Array, int]],
) -> tuple[int, ...]:
    """Validates the arguments of a call, and returns the sizes of the batch axes.

    The library validates the sizes of all other axes.

    **Arguments:**

    - `others`: names, further arrays, and the number of axes of each for one sequence.
    """
    named = [("x", x, 3), ("dt", dt, 3), ("B", B, 3), ("C", C, 3), ("A", A, 2), *others]
    for name, array, _ in named:
        if array.dtype != jnp.float32:
            raise ValueError(
                f"`{name}` must be float32, but got {array.dtype}. Convert it with "
                f"`{name}.astype(jnp.float32)`."
            )
    if reset.dtype != jnp.bool_:
        raise ValueError(f"`reset` must be bool, but got {reset.dtype}. Compare it with a number.")
    axes = x.ndim - 3
    for name, array, rank in [*named, ("reset", reset, 2)]:
        if axes < 0 or array.ndim != axes + rank:
            raise ValueError(
                f"`{name}` must have {rank} axes after those of the batch, as `x` has 3, but got "
                f"shapes {array.shape} and {x.shape}. Give every array the same batch axes, of "
                "size 1 where the sequences share it."
            )
    leads = [array.shape[:axes] for _, array, _ in [*named, ("reset", reset, 2)]]
    try:
        return np.broadcast_shapes(*leads)
    except ValueError as error:
        raise ValueError(
            f"The batch axes of all arrays must have the same sizes or 1, but got {leads}. Check "
            "the first axes."
        ) from error
