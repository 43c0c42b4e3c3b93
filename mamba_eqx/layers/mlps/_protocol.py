import abc

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray


class AbstractMLP(eqx.Module):
    """A map of every token by itself, for the MLP of a [`mamba_eqx.Block`][].

    The input has any number of leading axes, so that a map can work on all tokens of a sequence at
    once. Laws that hold for every subclass: the output of a token does not depend on other tokens,
    and has the dtype of the input.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "*seq {self.d_model}"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*seq {self.d_model}"]:
        """Applies the map.

        **Arguments:**

        - `x`: one token of shape `(d_model,)`, or tokens of shape `(..., d_model)`.
        - `key`: ignored; accepted so that the map fits into `equinox.nn.Sequential`.

        **Returns:**

        An array of the same shape and dtype.
        """
