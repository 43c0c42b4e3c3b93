import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from .._dtypes import at_least_float32
from ._masks import as_int32, fill_padding, mask_resets, real_tokens


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
    """
    seq, channels = x.shape
    lag = weight.shape[0] - 1
    if state is None:
        state = jnp.zeros((lag, channels), x.dtype)
    if seq == 0:
        # XLA's CPU backend aborts on the gradient of the taps of an empty sequence.
        return x, state
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
    y = jnp.sum(weight.astype(dtype) * window.astype(dtype), axis=0)
    if bias is not None:
        y = y + bias.astype(dtype)
    return y.astype(x.dtype), window[1:]
