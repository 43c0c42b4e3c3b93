import functools
import operator
from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ..._checks import to_python
from .._arguments import check_layer, check_token, checked_sequence, checked_states
from .._protocol import AbstractSequenceLayer, Length, Reset
from .._scaled import scaled
from ._validation import check_parallel


class Parallel(AbstractSequenceLayer[tuple[PyTree, ...]]):
    r"""Sequence layers side by side, whose scaled outputs are added,

    $$y = \sum_i c_i\, \mathrm{layer}_i(x),$$

    where the numbers $c_i$ are `scales`. The blocks of Falcon-H1 have [`mamba_eqx.Mamba2`][] and
    [`mamba_eqx.Attention`][] side by side: `Block(Parallel([mamba2, attention]))`. The state is the
    tuple of the layers' states.

    Reference: Zuo et al., *Falcon-H1: A Family of Hybrid-Head Language Models* (2025).
    """

    layers: tuple[AbstractSequenceLayer[PyTree], ...]
    scales: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        layers: Sequence[AbstractSequenceLayer[PyTree]],
        *,
        scales: tuple[float, ...] | None = None,
    ):
        """**Arguments:**

        - `layers`: at least one layer, all of the same `d_model`. (Wrap mixers, not
            [`mamba_eqx.Block`][]s: the sum of two blocks would add the residual stream twice.)
        - `scales`: a positive number for each layer, which multiplies its output; 1 by default.

        **Raises:** `ValueError` if there is no layer, one is a config instead of a layer, the
        layers differ in `d_model`, or `scales` is not a positive number for each layer.
        """
        self.layers = tuple(layers)
        for i, layer in enumerate(self.layers):
            check_layer(f"layers[{i}]", layer)
        widths = [layer.d_model for layer in self.layers]
        self.scales = check_parallel("layers", widths, to_python(scales))

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.layers[0].d_model

    def init_state(self, *, max_len: int | None = None) -> tuple[PyTree, ...]:
        """Returns the tuple of the layers' initial states."""
        return tuple(layer.init_state(max_len=max_len) for layer in self.layers)

    @jax.named_scope("mamba_eqx.Parallel.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: tuple[PyTree, ...] | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], tuple[PyTree, ...]]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("Parallel", self.d_model, x, reset, length)
        if state is None:
            state = (None,) * len(self.layers)
        state = checked_states("Parallel", len(self.layers), state)
        results = [
            layer.scan(x, layer_state, reset=reset, length=length)
            for layer, layer_state in zip(self.layers, state, strict=True)
        ]
        return self._sum(results)

    @jax.named_scope("mamba_eqx.Parallel.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: tuple[PyTree, ...]
    ) -> tuple[Float[Array, " {self.d_model}"], tuple[PyTree, ...]]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Parallel", self.d_model, x)
        state = checked_states("Parallel", len(self.layers), state)
        results = [
            layer.step(x, layer_state)
            for layer, layer_state in zip(self.layers, state, strict=True)
        ]
        return self._sum(results)

    def _sum(
        self, results: list[tuple[Float[Array, "*seq {self.d_model}"], PyTree]]
    ) -> tuple[Float[Array, "*seq {self.d_model}"], tuple[PyTree, ...]]:
        """Adds the outputs of the layers, and collects their states."""
        outputs, states = zip(*results, strict=True)
        return functools.reduce(operator.add, map(scaled, outputs, self.scales)), states
