import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._dtypes import at_least_float32
from ._masks import as_int32, fill_padding, mask_resets, real_tokens
from ._pieces import CONTEXT_AXIS, is_piece


@jax.jit
@jax.named_scope("mamba_eqx.ops.causal_conv1d")
def causal_conv1d(
    x: Float[Array, "seq channels"],
    weight: Float[Array, "d_conv channels"],
    bias: Float[Array, " channels"] | None,
    *,
    state: Float[Array, "lag channels"] | None = None,
    reset: Bool[Array, " seq"] | None = None,
    length: Integer[Array, ""] | int | None = None,
) -> tuple[Float[Array, "seq channels"], Float[Array, "lag channels"]]:
    r"""Computes a depthwise causal convolution over time,

    $$y_t = b + \sum_{k=0}^{K-1} w_k \, x_{t-(K-1)+k},$$

    with $K$ = `d_conv`, so that the last tap $w_{K-1}$ multiplies the current token. The
    convolution runs as $K$ shifted multiply-adds, which are faster on a CPU than a grouped
    convolution.

    **Arguments:**

    - `x`: the inputs, shape `(seq, channels)`.
    - `weight`: the taps, oldest first, shape `(d_conv, channels)`.
    - `bias`: the bias of every channel, shape `(channels,)`, or `None`.
    - `state`: the `lag = d_conv - 1` inputs before `x`, oldest first, shape `(lag, channels)`; zero
        if `None`.
    - `reset`: true where the inputs before a token count as zero, shape `(seq,)`.
    - `length`: the number of real tokens; later ones are padding. The returned state is the one
        after `length` tokens, and the outputs of padding are meaningless.

    **Returns:**

    The outputs, shape `(seq, channels)`, in the dtype of `x`, and the last `lag` inputs, shape
    `(lag, channels)`.

    **Raises:** `ValueError` for a piece of a sequence that is shorter than `lag`.
    """
    seq, channels = x.shape
    lag = weight.shape[0] - 1
    if state is None:
        state = jnp.zeros((lag, channels), x.dtype)
    if seq == 0:
        # XLA's CPU backend aborts on the gradient of the taps of an empty sequence.
        return x, state
    if not is_piece(x):
        return _convolve(x, weight, bias, state, reset, length)
    if seq < lag:
        raise ValueError(
            f"A piece of a sequence must have at least `d_conv - 1` tokens, but got {seq} tokens "
            f"on each device and d_conv={lag + 1}. Use fewer devices in the mesh axis "
            f"{CONTEXT_AXIS!r}."
        )
    # The last inputs of a piece are the state before the next one.
    _, tail = _convolve(x, weight, bias, jnp.zeros_like(state), reset, length)
    index = lax.axis_index(CONTEXT_AXIS)
    pairs = [(i, i + 1) for i in range(lax.axis_size(CONTEXT_AXIS) - 1)]
    before = lax.ppermute(tail, CONTEXT_AXIS, pairs)
    y, end = _convolve(x, weight, bias, jnp.where(index == 0, state, before), reset, length)
    has_tokens = jnp.int32(1) if length is None else jnp.asarray(as_int32(length) > 0, jnp.int32)
    last = jnp.maximum(lax.psum(has_tokens, CONTEXT_AXIS) - 1, 0)
    return y, lax.psum(jnp.where(index == last, end, jnp.zeros_like(end)), CONTEXT_AXIS)


def _convolve(
    x: Float[Array, "seq channels"],
    weight: Float[Array, "d_conv channels"],
    bias: Float[Array, " channels"] | None,
    state: Float[Array, "lag channels"],
    reset: Bool[Array, " seq"] | None,
    length: Integer[Array, ""] | int | None,
) -> tuple[Float[Array, "seq channels"], Float[Array, "lag channels"]]:
    """Runs the convolution from the inputs before `x`."""
    (seq, channels), lag = x.shape, len(state)
    real = real_tokens(seq, length)
    window = jnp.concatenate([state, fill_padding(real, x, 0)])
    if reset is None:
        document = None
    else:
        # A token sees only inputs of its own document. The inputs in `state` are document 0.
        reset = mask_resets(reset, real)
        document = jnp.concatenate(
            [jnp.zeros(lag + 1, jnp.int32), jnp.cumsum(reset, dtype=jnp.int32)]
        )

    dtype = at_least_float32(x, weight)
    y = jnp.zeros((seq, channels), dtype) if bias is None else bias.astype(dtype)
    for k in range(lag + 1):
        tap = window[k : k + seq]
        if document is not None and k < lag:
            same = document[k + 1 : k + 1 + seq] == document[lag + 1 :]
            tap = jnp.where(same[:, None], tap, jnp.zeros_like(tap))
        y = y + weight[k].astype(dtype) * tap.astype(dtype)

    end = seq if length is None else as_int32(length)
    new_state = lax.dynamic_slice_in_dim(window, end, lag)
    if document is not None:
        same = lax.dynamic_slice_in_dim(document, end + 1, lag) == document[lag + end]
        new_state = jnp.where(same[:, None], new_state, jnp.zeros_like(new_state))
    return y.astype(x.dtype), new_state


@jax.named_scope("mamba_eqx.ops.causal_conv1d_step")
def causal_conv1d_step(
    x: Float[Array, " channels"],
    weight: Float[Array, "d_conv channels"],
    bias: Float[Array, " channels"] | None,
    *,
    state: Float[Array, "lag channels"],
) -> tuple[Float[Array, " channels"], Float[Array, "lag channels"]]:
    """Computes one token of [`mamba_eqx.ops.causal_conv1d`][].

    **Arguments:**

    - `x`: the input, shape `(channels,)`.
    - `weight`: the taps, oldest first, shape `(d_conv, channels)`.
    - `bias`: the bias of every channel, shape `(channels,)`, or `None`.
    - `state`: the `lag = d_conv - 1` inputs before `x`, oldest first, shape `(lag, channels)`.

    **Returns:**

    The output, shape `(channels,)`, in the dtype of `x`, and the last `lag` inputs, shape
    `(lag, channels)`.
    """
    window = jnp.concatenate([state, x[None]])
    dtype = at_least_float32(x, weight)
    # XLA's CPU backend would run a `jnp.sum` over the taps as an operation of its own, which takes
    # many times as long as these few additions inside the loop over the channels (docs/speed.md).
    y = jnp.zeros_like(x, dtype) if bias is None else bias.astype(dtype)
    for tap, row in zip(weight.astype(dtype), window.astype(dtype), strict=True):
        y = y + tap * row
    return y.astype(x.dtype), window[1:]
