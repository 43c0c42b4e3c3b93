import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import ops
from ._arguments import check_features, check_reset_and_length, without_padding
from ._protocol import AbstractSequenceLayer, Length, Reset


class Bidirectional(eqx.Module):
    r"""A sequence layer run in both directions, for encoders,

    $$y = \mathrm{forward}(x) + \mathrm{flip}(\mathrm{backward}(\mathrm{flip}(x))),$$

    so that every output depends on every token. With `backward=None`, the same layer with the same
    weights runs in both directions.

    This class is not an [`mamba_eqx.AbstractSequenceLayer`][]: an output depends on later tokens,
    so there is no state and no `step`, and no language model can be built from it. Wrap mixers, not
    [`mamba_eqx.Block`][]s: the sum of two blocks would add the residual stream twice. In an
    encoder, put the norm and the residual around the bidirectional mixer:

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
    of Caduceus (Schiff et al., 2024). In both papers, the directions share the projections
    `in_proj` and `out_proj`; here they share all weights or none.
    """

    forward: AbstractSequenceLayer[PyTree]
    backward: AbstractSequenceLayer[PyTree] | None

    def __init__(
        self,
        forward: AbstractSequenceLayer[PyTree],
        backward: AbstractSequenceLayer[PyTree] | None = None,
    ):
        """**Arguments:**

        - `forward`: the layer that runs from the first token to the last.
        - `backward`: the layer that runs from the last token to the first; by default `forward`.

        **Raises:** `ValueError` if the two layers differ in `d_model`.
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
        """The number of features of a token."""
        return self.forward.d_model

    @jax.named_scope("mamba_eqx.Bidirectional")
    def __call__(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Reset = None,
        length: Length = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.d_model}"]:
        """Runs a whole sequence.

        **Arguments:**

        - `x`: the sequence, an array of shape `(seq, d_model)`.
        - `reset`: a boolean array of shape `(seq,)`, true at the first token of each document. In
            both directions, outputs depend on tokens of their own document only.
        - `length`: the number of real tokens, within `0..seq`. The tokens after them are padding:
            they influence no real token, and their outputs are meaningless.
        - `key`: ignored; accepted so that the layer fits into `equinox.nn.Sequential`.

        **Returns:**

        The outputs, an array of shape `(seq, d_model)`.

        **Raises:** `ValueError` if `x`, `reset` or `length` has the wrong shape or dtype.
        """
        if x.ndim != 2:
            raise ValueError(
                f"`Bidirectional` takes one whole sequence of shape (seq, {self.d_model}), but got "
                f"an array of shape {x.shape}. For a batch use `jax.vmap(layer)(x)`."
            )
        check_features("Bidirectional", self.d_model, x)
        check_reset_and_length("Bidirectional", x.shape[0], reset, length)
        x = without_padding(x, length)
        backward = self.forward if self.backward is None else self.backward
        reversed_reset = None
        if reset is not None:
            # A document that begins at a token ends, for the reversed sequence, one token earlier.
            # `roll` wraps one flag around; it lands on a first token or on padding, where it has
            # no effect.
            reversed_reset = _reverse(jnp.roll(reset, -1), length)
        y = backward(_reverse(x, length), reset=reversed_reset, length=length)
        return self.forward(x, reset=reset, length=length) + _reverse(y, length)


def _reverse(x: Array, length: Array | int | None) -> Array:
    """Reverses the first `length` tokens, and separately the padding after them. Applied twice, it
    returns `x`."""
    flipped = jnp.flip(x, axis=0)
    return flipped if length is None else jnp.roll(flipped, ops.as_int32(length), axis=0)
