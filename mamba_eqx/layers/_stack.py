import abc
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._arguments import check_token, checked_sequence, checked_states, describe_state
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
        _check_remat("Unrolled", remat)
        self.layers = _checked_layers("Unrolled", layers)
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
        scan = _scan_layer(self.remat, with_routes=with_routes)
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


class Stacked(AbstractStack[PyTree]):
    """Layers of one structure, with their parameters stacked along a new first axis, run by a loop.

    A stack compiles once instead of once per layer, and with `remat` it stores the intermediates of
    one layer at a time, which makes it the choice for training deep models. Its state consists of
    the layers' states, stacked along a new first axis.
    """

    layers: Layer
    n_layer: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)

    def __init__(self, layers: Sequence[Layer], *, remat: Remat = False):
        """**Arguments:**

        - `layers`: at least one layer, all of the same structure and shapes.
        - `remat`: as for [`mamba_eqx.Unrolled`][].

        **Raises:** `ValueError` as for [`mamba_eqx.Unrolled`][], and if two layers differ in
        structure, shapes or dtypes.
        """
        _check_remat("Stacked", remat)
        layers = _checked_layers("Stacked", layers)
        for i, layer in enumerate(layers):
            if _signature(layer) != _signature(layers[0]):
                raise ValueError(
                    "The layers of `Stacked` must have the same structure, shapes and dtypes, but "
                    f"layer {i} ({type(layer).__name__}) differs from layer 0 "
                    f"({type(layers[0]).__name__}). Use `Unrolled` for layers that differ."
                )
        arrays = [eqx.filter(layer, eqx.is_array) for layer in layers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
        self.layers = eqx.combine(stacked, layers[0])
        self.n_layer = len(layers)
        self.remat = remat

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.layers.d_model

    def unstack(self) -> tuple[Layer, ...]:
        """Returns the layers, first to last."""
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        return tuple(eqx.combine(_unstacked(arrays, i), rest) for i in range(self.n_layer))

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """Returns the layers' initial states, stacked along a new first axis."""
        make = eqx.filter_vmap(lambda layer: layer.init_state(max_len=max_len))
        return make(self.layers)

    @jax.named_scope("mamba_eqx.Stacked.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        x = checked_sequence("Stacked", self.d_model, x, reset, length)
        scan = _scan_layer(self.remat)
        return self._loop(lambda layer, x, s: scan(layer, x, s, reset, length)[:2], x, state)

    @jax.named_scope("mamba_eqx.Stacked.scan")
    def scan_with_routes(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: PyTree | None = None,
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree, tuple[Routes, ...]]:
        """See [`mamba_eqx.layers.AbstractStack.scan_with_routes`][]."""
        x = checked_sequence("Stacked", self.d_model, x, reset, length, verb="scan_with_routes")
        scan = _scan_layer(self.remat, with_routes=True)

        def run(layer: Layer, x: Array, state: PyTree) -> tuple[Array, PyTree]:
            y, *rest = scan(layer, x, state, reset, length)
            return y, rest

        y, (state, stacked) = self._loop(run, x, state)
        routes = [_unstacked(stacked, i) for i in range(self.n_layer)]
        return y, state, tuple(itertools.chain(*routes))

    @jax.named_scope("mamba_eqx.Stacked.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: PyTree
    ) -> tuple[Float[Array, " {self.d_model}"], PyTree]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Stacked", self.d_model, x)
        return self._loop(lambda layer, x, s: layer.step(x, s), x, state)

    def hidden_states(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Reset = None,
        length: Length = None,
    ) -> Float[Array, "{self.n_layer} seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractStack.hidden_states`][]."""
        x = checked_sequence("Stacked", self.d_model, x, reset, length, verb="hidden_states")

        scan = _scan_layer(self.remat)

        def run(layer: Layer, x: Array, _: PyTree) -> tuple[Array, Array]:
            y, *_ = scan(layer, x, None, reset, length)
            return y, y

        return self._loop(run, x, None)[1]

    def _loop(
        self,
        run: Callable[[Layer, Array, PyTree], tuple[Array, PyTree]],
        x: Array,
        state: PyTree,
    ) -> tuple[Array, PyTree]:
        """Runs every layer on the output of the layer before it, in one compiled loop.

        **Arguments:**

        - `run`: runs one layer: a function of the layer, its input and its state.
        - `x`: the input of the first layer.
        - `state`: the states of the layers, stacked.

        **Returns:**

        The output of the last layer, and the second results of `run`, stacked.
        """
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        if any(jnp.shape(leaf)[:1] != (self.n_layer,) for leaf in jax.tree.leaves(state)):
            raise ValueError(
                f"The state of a `Stacked` of {self.n_layer} layers must have a first axis of "
                f"{self.n_layer} in every leaf, but got {describe_state(state)}. "
                "Start from `layer.init_state()`."
            )

        def body(x: Array, layer: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
            arrays, state = layer
            return run(eqx.combine(arrays, rest), x, state)

        return lax.scan(body, x, (arrays, state))


def _scan_layer(
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
    return eqx.filter_checkpoint(scan, policy=None if remat is True else remat)


def _unstacked(tree: PyTree, i: int) -> PyTree:
    """Returns the part of stacked arrays that belongs to layer `i`."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _check_remat(name: str, remat: object) -> None:
    if not isinstance(remat, bool) and not callable(remat):
        raise ValueError(
            f"`remat` of `{name}` must be True, False, or one of `jax.checkpoint_policies`, but "
            f"got {remat!r}."
        )


def _checked_layers(name: str, layers: Sequence[Layer]) -> tuple[Layer, ...]:
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


def _signature(layer: Layer) -> tuple[Hashable, ...]:
    """Returns what two layers must share to be stacked."""
    arrays, rest = eqx.partition(layer, eqx.is_array)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays))
    return (
        jax.tree.structure(arrays),
        shapes,
        tuple(jax.tree.leaves(rest)),
        jax.tree.structure(rest),
    )
