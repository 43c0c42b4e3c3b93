from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._arguments import check_features, check_reset_and_length
from ._protocol import AbstractSequenceLayer


class Bidirectional(eqx.Module):
    r"""A sequence layer run both ways, for encoders,

    $$y = \mathrm{forward}(x) + \mathrm{flip}(\mathrm{backward}(\mathrm{flip}(x))),$$

    so that every output has seen every token. With `backward=None` the same layer, with the same
    weights, runs both ways.

    It is not a sequence layer itself: an output depends on tokens to come, so that there is neither
    a state nor a `step`, and no language model can be made of it. By its type it fits nowhere that
    takes an [`mamba_eqx.AbstractSequenceLayer`][]. The layers in it are mixers: of a
    [`mamba_eqx.Block`][] the sum would have the residual stream twice. In an encoder the norm and
    the residual go around it:

    ```python
    class EncoderBlock(eqx.Module):
        norm: eqx.nn.RMSNorm
        mixer: mbx.Bidirectional

        def __call__(self, x, *, length=None):
            return x + self.mixer(jax.vmap(self.norm)(x), length=length)

    keys = jr.split(jr.key(0))
    mixer = mbx.Bidirectional(mbx.Mamba1(32, key=keys[0]), mbx.Mamba1(32, key=keys[1]))
    block = EncoderBlock(eqx.nn.RMSNorm(32), mixer)
    ```

    The directions are summed as in Vision Mamba (Zhu et al., 2024, algorithm 1) and in the BiMamba
    of Caduceus (Schiff et al., 2024). Both share a part of the weights between the directions, the
    projections `in_proj` and `out_proj`; here either all are shared or none.
    """

    forward: AbstractSequenceLayer[Any]
    backward: AbstractSequenceLayer[Any] | None

    def __init__(
        self,
        forward: AbstractSequenceLayer[Any],
        backward: AbstractSequenceLayer[Any] | None = None,
    ):
        """**Arguments:**

        - `forward`: runs from the first token to the last.
        - `backward`: runs from the last to the first; `forward` does that too if `None`.

        **Raises:** `ValueError` if the two differ in `d_model`.
        """
        if backward is not None and backward.d_model != forward.d_model:
            raise ValueError(
                "`forward` and `backward` must share `d_model`, but got "
                f"{forward.d_model} and {backward.d_model}."
            )
        self.forward = forward
        self.backward = backward

    @property
    def d_model(self) -> int:
        return self.forward.d_model

    @jax.named_scope("mamba_eqx.Bidirectional")
    def __call__(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.d_model}"]:
        """**Arguments:**

        - `x`: a whole sequence.
        - `reset`: where true, a document begins: tokens see those of their own document only, in
            both directions.
        - `length`: only the first `length` tokens are real, the others are padding, which no real
            token sees. Outputs after them mean nothing.
        - `key`: ignored; accepted so that the layer fits into `equinox.nn.Sequential`.
        """
        if x.ndim != 2:
            raise ValueError(
                f"`Bidirectional` takes one whole sequence of shape (seq, {self.d_model}), but got "
                f"an array of shape {x.shape}. For a batch use `jax.vmap(layer)(x)`."
            )
        check_features("Bidirectional", self.d_model, x)
        check_reset_and_length("Bidirectional", x.shape[0], reset, length)
        backward = self.forward if self.backward is None else self.backward
        behind = None
        if reset is not None:
            # A document that begins at a token begins, seen from behind, after that token: at the
            # one before it. What comes round to the other end is at a first token, or in padding.
            behind = _reverse(jnp.roll(reset, -1), length)
        y = backward(_reverse(x, length), reset=behind, length=length)
        return self.forward(x, reset=reset, length=length) + _reverse(y, length)


def _reverse(x: Array, length: Array | int | None) -> Array:
    """The first `length` tokens in reverse, the others still after them; its own inverse."""
    flipped = jnp.flip(x, axis=0)
    return flipped if length is None else jnp.roll(flipped, length, axis=0)
