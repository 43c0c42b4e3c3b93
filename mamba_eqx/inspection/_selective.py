import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .. import ops
from ..layers import Block, Mamba1, Mamba2
from ..models import LanguageModel


class MixerInput(NamedTuple):
    """A selective mixer of a model, and what it reads; see [`mamba_eqx.inspection.mixer_inputs`][].

    - `path`: the path of the mixer, such as `layers.layers.0.mixer`.
    - `mixer`: the mixer, a [`mamba_eqx.Mamba1`][] or a [`mamba_eqx.Mamba2`][].
    - `x`: the input of the mixer, shape `(seq, d_model)`.
    """

    path: str
    mixer: Mamba1 | Mamba2
    x: Float[Array, "seq d_model"]


def mixer_inputs(model: LanguageModel, tokens: Integer[Array, " seq"]) -> tuple[MixerInput, ...]:
    """Returns the selective mixers of a model with the input of each, for a text from the empty
    past.

    **Arguments:**

    - `model`: a language model whose layers are blocks, `Unrolled` or `Stacked`.
    - `tokens`: token ids, shape `(seq,)`.

    **Returns:**

    A [`mamba_eqx.inspection.MixerInput`][] for each `Mamba1` and `Mamba2`, first layer first. Other
    mixers are left out.

    **Raises:** `ValueError` if `tokens` is not one sequence of integers, or if the model has no
    such mixer.
    """
    # The last entry is the output of the final norm.
    after = model.hidden_states(tokens)[:-1]
    found = []
    before = [model.embed(tokens).astype(after.dtype), *after]
    for i, (layer, x) in enumerate(zip(model.layers.unstack(), before, strict=False)):
        if isinstance(layer, Block) and isinstance(layer.mixer, Mamba1 | Mamba2):
            path = f"layers.layers.{i}.mixer"
            found.append(MixerInput(path, layer.mixer, jax.vmap(layer.norm)(x)))
    if not found:
        raise ValueError(
            "The model must have a block whose mixer is a `Mamba1` or a `Mamba2`, but has none. If "
            "`tensor_parallel` has cut it, call `sharding.gathered` first."
        )
    return tuple(found)


def step_sizes(
    mixer: Mamba1 | Mamba2, x: Float[Array, "seq d_model"]
) -> Float[Array, "seq channels"]:
    r"""Returns the step sizes $\Delta_t$ that a mixer selects for a sequence. A token with a small
    step size is nearly ignored, and a large one makes the state forget.

    **Arguments:**

    - `mixer`: a [`mamba_eqx.Mamba1`][] or a [`mamba_eqx.Mamba2`][].
    - `x`: the input of the mixer, shape `(seq, d_model)`.

    **Returns:**

    The step sizes, which are positive, shape `(seq, d_inner)` for Mamba-1 and `(seq, nheads)` for
    Mamba-2.

    **Raises:** `ValueError` if `x` is not a sequence for the mixer.
    """
    return mixer.select(x).dt


def half_lives(
    mixer: Mamba1 | Mamba2, x: Float[Array, "seq d_model"]
) -> Float[Array, " nheads"] | Float[Array, "d_inner d_state"]:
    r"""Returns after how many tokens half of what is in a state is left,

    $$\frac{\ln 2}{\bar\Delta\, |A|},$$

    where $\bar\Delta$ is the mean of the step sizes over the sequence.

    **Arguments:**

    - `mixer`: a [`mamba_eqx.Mamba1`][] or a [`mamba_eqx.Mamba2`][].
    - `x`: the input of the mixer, shape `(seq, d_model)`, with at least one token.

    **Returns:**

    The half-lives in tokens, shape `(d_inner, d_state)` for Mamba-1 and `(nheads,)` for Mamba-2.

    **Raises:** `ValueError` if `x` is not a sequence for the mixer, or has no token.
    """
    dt = mixer.select(x).dt
    if not len(dt):
        raise ValueError("`x` must have at least one token, but got none. Give a longer text.")
    mean = dt.mean(axis=0)
    return -math.log(2) / (mixer.A * (mean[:, None] if isinstance(mixer, Mamba1) else mean))


def state_norms(
    mixer: Mamba1 | Mamba2, x: Float[Array, "seq d_model"]
) -> Float[Array, "seq channels"]:
    r"""Returns the Euclidean norm of the hidden state $h_t$ after every token, from the empty past.

    **Arguments:**

    - `mixer`: a [`mamba_eqx.Mamba1`][] or a [`mamba_eqx.Mamba2`][].
    - `x`: the input of the mixer, shape `(seq, d_model)`.

    **Returns:**

    The norms, shape `(seq, d_inner)` for Mamba-1, over the state of a channel, and `(seq, nheads)`
    for Mamba-2, over the state of a head.

    **Raises:** `ValueError` if `x` is not a sequence for the mixer.
    """
    u, dt, B, C = mixer.select(x)[:4]
    op = ops.selective_scan_step if isinstance(mixer, Mamba1) else ops.ssd_step
    axes = 0 if isinstance(mixer, Mamba1) else (0, 2)

    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        u, dt, B, C = token
        _, h = op(u, dt, mixer.A, B, C, mixer.D, state=h)
        return h, jnp.sqrt(jnp.sum(h**2, axis=axes))

    return jax.lax.scan(step, mixer.init_state().ssm, (u, dt, B, C))[1]


def mixing_matrices(
    mixer: Mamba1 | Mamba2, x: Float[Array, "seq d_model"]
) -> Float[Array, "channels seq seq"]:
    r"""Returns the matrices by which the recurrence of a mixer multiplies a sequence: which past
    tokens $s$ the output at $t$ still hears. They play the part of attention weights, but may be
    negative, and their rows have no fixed sum:

    $$M_{ts} = C_t^\top e^{(\Delta_{s+1} + \dots + \Delta_t) A} B_s\, \Delta_s \quad (s \le t),
      \qquad M_{tt} \mathrel{+}= D.$$

    Mamba-1 has one matrix for each channel, Mamba-2 one for each head. The output of
    [`mamba_eqx.ops.selective_scan`][] or [`mamba_eqx.ops.ssd`][] is the product of the matrix and
    the `u` of [`mamba_eqx.layers.Mamba1Selection`][] or [`mamba_eqx.layers.Mamba2Selection`][].
    The convolution, the gate and the norm of the mixer are not part of the matrices.

    Reference: Dao and Gu, *Transformers are SSMs* (2024), sections 3 and 5; Ali et al., *The Hidden
    Attention of Mamba Models* (2024).

    **Arguments:**

    - `mixer`: a [`mamba_eqx.Mamba1`][], or a [`mamba_eqx.Mamba2`][] without `D_has_hdim`, whose
        channels would have diagonals of their own.
    - `x`: the input of the mixer, shape `(seq, d_model)`. The result has `seq**2` numbers for each
        channel or head.

    **Returns:**

    The matrices, shape `(d_inner, seq, seq)` for Mamba-1 and `(nheads, seq, seq)` for Mamba-2.

    **Raises:** `ValueError` if `x` is not a sequence for the mixer, or `mixer` has `D_has_hdim`.
    """
    if mixer.D.ndim > 1:
        raise ValueError(
            "`mixer` must have one `D` per head, but got D_has_hdim=True, which gives every "
            "channel a matrix of its own. Look at `step_sizes` or `state_norms` instead."
        )
    _, dt, B, C = mixer.select(x)[:4]
    dtype = jnp.result_type(mixer.A.dtype, dt.dtype)
    dt, B, C = (array.astype(dtype) for array in (dt, B, C))
    if isinstance(mixer, Mamba1):
        run = lambda channel: _matrix(channel[0], channel[1], channel[2], B, C)
        return jax.lax.map(run, (dt.T, mixer.A.astype(dtype), mixer.D.astype(dtype)))
    # Neighbouring heads share a group. A head has one rate, which is that of all its dimensions.
    heads = mixer.nheads // mixer.ngroups
    B, C = (jnp.repeat(array, heads, axis=1).swapaxes(0, 1) for array in (B, C))
    A = mixer.A.astype(dtype)[:, None]
    return jax.lax.map(lambda head: _matrix(*head), (dt.T, A, mixer.D.astype(dtype), B, C))


def _matrix(
    dt: Float[Array, " seq"],
    A: Float[Array, " rates"],
    D: Float[Array, ""],
    B: Float[Array, "seq d_state"],
    C: Float[Array, "seq d_state"],
) -> Float[Array, "seq seq"]:
    """Returns the matrix of a channel or head. `rates` is `d_state`, or 1 for a single rate."""
    seq = dt.shape[0]
    t, s = jnp.arange(seq)[:, None], jnp.arange(seq)[None, :]
    # Sums over the tokens between s and t, whose rounding does not grow as differences of sums do.
    between = jnp.cumsum(jnp.where(t > s, dt[:, None], 0), axis=0)
    decay = jnp.exp(between[..., None] * A)
    heard = jnp.sum(decay * C[:, None] * B[None], axis=-1)
    return jnp.where(t >= s, heard * dt, 0) + D * jnp.eye(seq, dtype=dt.dtype)
