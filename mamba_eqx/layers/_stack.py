import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jaxtyping import Array, Float, PyTree

from .. import ops
from ._arguments import check_token, checked_sequence, checked_states
from ._block import Block
from ._protocol import AbstractSequenceLayer, Length, Reset, State
from .mlps import Routes


# A stack may mix layers, whose states are of different types.
Layer: TypeAlias = AbstractSequenceLayer[PyTree]
Remat: TypeAlias = bool | Callable[..., bool]


class AbstractStack(AbstractSequenceLayer[State]):
    """Layers of the same `d_model`, run one after another.

    [`mamba_eqx.Unrolled`][] and [`mamba_eqx.Stacked`][] compute the same function of the same
    parameters. Convert with `Stacked(unrolled.unstack())` and `Unrolled(stacked.unstack())`.
    """

    n_layer: eqx.AbstractVar[int]

    @abc.abstractmethod
    def unstack(self) -> tuple[Layer, ...]:
        """Returns the layers, first to last."""

    @abc.abstractmethod
    def hidden_states(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> Float[Array, "{self.n_layer} seq {self.d_model}"]:
        """Runs a whole sequence from the empty past and returns the outputs of every layer.

        **Arguments:**

        - `x`, `reset`, `length`: as for `scan`.

        **Returns:**

        An array of shape `(n_layer, seq, d_model)`, first layer first.

        **Raises:** `ValueError` as `scan` does.
        """

    @abc.abstractmethod
    def scan_with_routes(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: State | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], State, tuple[Routes, ...]]:
        """Runs `scan`, and also returns which experts the layers chose.

        **Arguments:** as for `scan`.

        **Returns:**

        The outputs and the state of `scan`, and the [`mamba_eqx.layers.Routes`][] of every
        [`mamba_eqx.Block`][] with a [`mamba_eqx.MixtureOfExperts`][], first layer first. The routes
        of padding are arbitrary.

        **Raises:** `ValueError` as `scan` does.
        """


class Unrolled(AbstractStack[tuple[PyTree, ...]]):
    """A tuple of layers, each with its own structure and its own place in the compiled code.

    This is the default. Its paths are readable (`model.layers.layers[3].mixer.A_log`), it takes any
    mixture of layers, and it decodes faster than [`mamba_eqx.Stacked`][], because no weight has to
    be sliced out of a stack. Its state is the tuple of the layers' states.
    """

    layers: tuple[Layer, ...]
    remat: Remat = eqx.field(static=True)

    def __init__(self, layers: Sequence[Layer], *, remat: Remat = False):
        """**Arguments:**

        - `layers`: at least one layer, all of the same `d_model`.
        - `remat`: whether to recompute a layer's intermediates in the reverse pass instead of
            storing them, which takes less memory and more time; `False` by default. One of
            `jax.checkpoint_policies` stores a selection: for instance,
            `dots_with_no_batch_dims_saveable` stores the products with weights (docs/training.md
            has the numbers).

        **Raises:** `ValueError` if there is no layer, the layers differ in `d_model`, or `remat` is
        neither a bool nor a function.
        """
        check_remat("Unrolled", remat)
        self.layers = checked_layers("Unrolled", layers)
        self.remat = remat

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.layers[0].d_model

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return len(self.layers)

    def unstack(self) -> tuple[Layer, ...]:
        """Returns the layers, first to last."""
        return self.layers

    def init_state(self, *, max_len: int | None = None) -> tuple[PyTree, ...]:
        """Returns the tuple of the layers' initial states."""
        return tuple(layer.init_state(max_len=max_len) for layer in self.layers)

    @jax.named_scope("mamba_eqx.Unrolled.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: tuple[PyTree, ...] | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], tuple[PyTree, ...]]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("Unrolled", self.d_model, x, reset, length)
        outputs, states, _ = self._run(x, state, reset, length)
        return outputs[-1], states

    @jax.named_scope("mamba_eqx.Unrolled.scan")
    def scan_with_routes(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: tuple[PyTree, ...] | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], tuple[PyTree, ...], tuple[Routes, ...]]:
        """See [`mamba_eqx.layers.AbstractStack.scan_with_routes`][]."""
        x = checked_sequence("Unrolled", self.d_model, x, reset, length, verb="scan_with_routes")
        outputs, states, routes = self._run(x, state, reset, length, with_routes=True)
        return outputs[-1], states, routes

    @jax.named_scope("mamba_eqx.Unrolled.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: tuple[PyTree, ...]
    ) -> tuple[Float[Array, " {self.d_model}"], tuple[PyTree, ...]]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Unrolled", self.d_model, x)
        state = checked_states("Unrolled", self.n_layer, state)
        states = []
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, layer_state = layer.step(x, layer_state)
            states.append(layer_state)
        return x, tuple(states)

    def hidden_states(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> Float[Array, "{self.n_layer} seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractStack.hidden_states`][]."""
        x = checked_sequence("Unrolled", self.d_model, x, reset, length, verb="hidden_states")
        return jnp.stack(self._run(x, None, reset, length)[0])

    def _run(
        self,
        x: Array,
        state: tuple[PyTree, ...] | None,
        reset: Reset,
        length: Length,
        *,
        with_routes: bool = False,
    ) -> tuple[list[Array], tuple[PyTree, ...], tuple[Routes, ...]]:
        scan = scan_layer(self.remat, with_routes=with_routes)
        outputs, states, routes = [], [], ()
        if state is None:
            state = (None,) * self.n_layer
        state = checked_states("Unrolled", self.n_layer, state)
        for layer, layer_state in zip(self.layers, state, strict=True):
            x, layer_state, layer_routes = scan(layer, x, layer_state, reset, length)
            outputs.append(x)
            states.append(layer_state)
            routes += layer_routes
        return outputs, tuple(states), routes


def scan_layer(
    remat: Remat, *, with_routes: bool = False
) -> Callable[[Layer, Array, PyTree, Reset, Length], tuple[Array, PyTree, tuple[Routes, ...]]]:
    """Returns the `scan` of layers as a function whose first argument is the layer, with the given
    rematerialisation. Its third result is empty if not `with_routes`, and for layers that have no
    routes."""

    def scan(
        layer: Layer, x: Array, state: PyTree, reset: Array | None, length: Array | int | None
    ) -> tuple[Array, PyTree, tuple[Routes, ...]]:
        if with_routes and isinstance(layer, Block | AbstractStack):
            return layer.scan_with_routes(x, state, reset=reset, length=length)
        return (*layer.scan(x, state, reset=reset, length=length), ())

    if remat is False:
        return scan
    if remat is True:
        return eqx.filter_checkpoint(scan)

    def policy(primitive: Primitive, *avals: object, **parameters: Any) -> Any:
        # JAX's policies would not know our products for products.
        primitive, parameters = ops.as_dot_general(primitive, parameters)
        return remat(primitive, *avals, **parameters)

    return eqx.filter_checkpoint(scan, policy=policy)


def check_remat(name: str, remat: object) -> None:
    if not isinstance(remat, bool) and not callable(remat):
        raise ValueError(
            f"`remat` of `{name}` must be True, False, or one of `jax.checkpoint_policies`, but "
            f"got {remat!r}."
        )


def checked_layers(name: str, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    layers = tuple(layers)
    if not layers:
        raise ValueError(f"`{name}` needs at least one layer, but got none.")
    for i, layer in enumerate(layers):
        if layer.d_model != layers[0].d_model:
            raise ValueError(
                f"The layers of `{name}` must share `d_model`, but layer 0 has "
                f"d_model={layers[0].d_model} and layer {i} has d_model={layer.d_model}."
            )
    return layers
