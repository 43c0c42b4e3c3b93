import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._arguments import check_sequence, check_token
from ._protocol import AbstractSequenceLayer, State


class AbstractStack(AbstractSequenceLayer[State]):
    """Layers of the same `d_model`, run one after another.

    [`mamba_eqx.Unrolled`][] and [`mamba_eqx.Stacked`][] are the same function of the same
    parameters. Convert with `Stacked(unrolled.unstack())` and `Unrolled(stacked.unstack())`.
    """

    n_layer: eqx.AbstractVar[int]

    @abc.abstractmethod
    def unstack(self) -> tuple[AbstractSequenceLayer[Any], ...]:
        """The layers, first to last."""

    @abc.abstractmethod
    def hidden_states(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "{self.n_layer} seq {self.d_model}"]:
        """The output of every layer, run from the empty past.

        **Arguments:** as for `scan`.
        """


class Unrolled(AbstractStack[tuple[Any, ...]]):
    """Layers in a tuple, each with its own structure and its own place in the compiled code.

    The default: readable paths (`model.layers.layers[3].mixer.A_log`), any mixture of layers, and
    the faster one when decoding, since no weight has to be sliced out of a stack. Its state is
    the tuple of the layers' states.
    """

    layers: tuple[AbstractSequenceLayer[Any], ...]
    remat: bool | Callable[..., Any] = eqx.field(static=True)

    def __init__(
        self,
        layers: Sequence[AbstractSequenceLayer[Any]],
        *,
        remat: bool | Callable[..., Any] = False,
    ):
        """**Arguments:**

        - `layers`: at least one, all of the same `d_model`.
        - `remat`: whether the reverse pass computes again what happens inside a layer instead of
            keeping it: less memory, more time. Or what it is to keep, as one of
            `jax.checkpoint_policies`: `dots_with_no_batch_dims_saveable` keeps the results of
            products with weights (docs/training.md has the numbers).

        **Raises:** `ValueError` if there is no layer, or they differ in `d_model`, or `remat` is
        neither a bool nor a function.
        """
        _check_remat("Unrolled", remat)
        self.layers = _check_layers("Unrolled", layers)
        self.remat = remat

    @property
    def d_model(self) -> int:
        return self.layers[0].d_model

    @property
    def n_layer(self) -> int:
        return len(self.layers)

    def unstack(self) -> tuple[AbstractSequenceLayer[Any], ...]:
        """The layers, first to last."""
        return self.layers

    def init_state(self, *, max_len: int | None = None) -> tuple[Any, ...]:
        """The tuple of the layers' initial states."""
        return tuple(layer.init_state(max_len=max_len) for layer in self.layers)

    @jax.named_scope("mamba_eqx.Unrolled.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: tuple[Any, ...] | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], tuple[Any, ...]]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        check_sequence("Unrolled", self.d_model, x, reset, length)
        outputs, states = self._run(x, state, reset, length)
        return outputs[-1], states

    @jax.named_scope("mamba_eqx.Unrolled.step")
    def step(
        self, x: Float[Array, " {self.d_model}"], state: tuple[Any, ...]
    ) -> tuple[Float[Array, " {self.d_model}"], tuple[Any, ...]]:
        """See [`mamba_eqx.AbstractSequenceLayer.step`][]."""
        check_token("Unrolled", self.d_model, x)
        states = []
        for layer, layer_state in zip(self.layers, self._check_state(state), strict=True):
            x, layer_state = layer.step(x, layer_state)
            states.append(layer_state)
        return x, tuple(states)

    def hidden_states(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "{self.n_layer} seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractStack.hidden_states`][]."""
        check_sequence("Unrolled", self.d_model, x, reset, length)
        return jnp.stack(self._run(x, None, reset, length)[0])

    def _run(
        self, x: Array, state: tuple[Any, ...] | None, reset: Array | None, length: Any
    ) -> tuple[list[Array], tuple[Any, ...]]:
        scan = _scan_layer(self.remat)
        outputs, states = [], []
        if state is None:
            state = (None,) * self.n_layer
        for layer, layer_state in zip(self.layers, self._check_state(state), strict=True):
            x, layer_state = scan(layer, x, layer_state, reset, length)
            outputs.append(x)
            states.append(layer_state)
        return outputs, tuple(states)

    def _check_state(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(state, tuple) or len(state) != self.n_layer:
            raise ValueError(
                f"The state of an `Unrolled` of {self.n_layer} layers is a tuple of {self.n_layer} "
                f"states, but got {_describe(state)}. Start from `layer.init_state()`."
            )
        return state


class Stacked(AbstractStack[PyTree]):
    """Layers of one structure, their parameters stacked along a new first axis, run by a loop.

    It compiles once instead of once per layer, and with `remat` holds one layer's intermediates
    instead of all: for deep models in training. Its state is the layers' states, stacked likewise.
    """

    layers: AbstractSequenceLayer[Any]
    n_layer: int = eqx.field(static=True)
    remat: bool | Callable[..., Any] = eqx.field(static=True)

    def __init__(
        self,
        layers: Sequence[AbstractSequenceLayer[Any]],
        *,
        remat: bool | Callable[..., Any] = False,
    ):
        """**Arguments:**

        - `layers`: at least one, all of the same structure and shapes.
        - `remat`: as for [`mamba_eqx.Unrolled`][].

        **Raises:** `ValueError` as for [`mamba_eqx.Unrolled`][], and if two layers differ in
        structure, shapes or dtypes.
        """
        _check_remat("Stacked", remat)
        layers = _check_layers("Stacked", layers)
        for i, layer in enumerate(layers):
            if _signature(layer) != _signature(layers[0]):
                raise ValueError(
                    "`Stacked` needs layers of one structure, shapes and dtypes, but layer "
                    f"{i} ({type(layer).__name__}) differs from layer 0 "
                    f"({type(layers[0]).__name__}). Use `Unrolled` for layers that differ."
                )
        arrays = [eqx.filter(layer, eqx.is_array) for layer in layers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
        self.layers = eqx.combine(stacked, layers[0])
        self.n_layer = len(layers)
        self.remat = remat

    @property
    def d_model(self) -> int:
        return self.layers.d_model

    def unstack(self) -> tuple[AbstractSequenceLayer[Any], ...]:
        """The layers, first to last."""
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        return tuple(
            eqx.combine(jax.tree.map(lambda leaf: leaf[i], arrays), rest)  # noqa: B023
            for i in range(self.n_layer)
        )

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """The layers' initial states, stacked."""
        make = eqx.filter_vmap(lambda layer: layer.init_state(max_len=max_len))
        return make(self.layers)

    @jax.named_scope("mamba_eqx.Stacked.scan")
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: PyTree | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], PyTree]:
        """See [`mamba_eqx.AbstractSequenceLayer.scan`][]."""
        check_sequence("Stacked", self.d_model, x, reset, length)
        scan = _scan_layer(self.remat)
        return self._loop(lambda layer, x, s: scan(layer, x, s, reset, length), x, state)

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
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "{self.n_layer} seq {self.d_model}"]:
        """See [`mamba_eqx.layers.AbstractStack.hidden_states`][]."""
        check_sequence("Stacked", self.d_model, x, reset, length)

        def run(layer: Any, x: Array, _: None) -> tuple[Array, Array]:
            y, _ = layer.scan(x, reset=reset, length=length)
            return y, y

        return self._loop(run, x, None)[1]

    def _loop(
        self, run: Callable[[Any, Array, Any], tuple[Array, Any]], x: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        if any(jnp.shape(leaf)[:1] != (self.n_layer,) for leaf in jax.tree.leaves(state)):
            raise ValueError(
                f"The state of a `Stacked` of {self.n_layer} layers has a first axis of "
                f"{self.n_layer} in every leaf, but got {_describe(state)}. "
                "Start from `layer.init_state()`."
            )

        def body(x: Array, layer: tuple[Any, Any]) -> tuple[Array, Any]:
            arrays, state = layer
            return run(eqx.combine(arrays, rest), x, state)

        return lax.scan(body, x, (arrays, state))


def _scan_layer(remat: bool | Callable[..., Any]) -> Callable[..., tuple[Array, Any]]:
    def scan(
        layer: AbstractSequenceLayer[Any], x: Array, state: Any, reset: Array | None, length: Any
    ) -> tuple[Array, Any]:
        return layer.scan(x, state, reset=reset, length=length)

    if remat is False:
        return scan
    return eqx.filter_checkpoint(scan, policy=None if remat is True else remat)


def _check_remat(name: str, remat: Any) -> None:
    if not isinstance(remat, bool) and not callable(remat):
        raise ValueError(
            f"`remat` of `{name}` must be True, False, or one of `jax.checkpoint_policies`, but "
            f"got {remat!r}."
        )


def _check_layers(
    name: str, layers: Sequence[AbstractSequenceLayer[Any]]
) -> tuple[AbstractSequenceLayer[Any], ...]:
    layers = tuple(layers)
    if not layers:
        raise ValueError(f"`{name}` needs at least one layer, but got none.")
    for i, layer in enumerate(layers):
        if layer.d_model != layers[0].d_model:
            raise ValueError(
                f"The layers of an `{name}` must share `d_model`, but layer 0 has "
                f"d_model={layers[0].d_model} and layer {i} has d_model={layer.d_model}."
            )
    return layers


def _signature(layer: PyTree) -> tuple[Any, ...]:
    arrays, rest = eqx.partition(layer, eqx.is_array)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]
    return jax.tree.structure(arrays), shapes, jax.tree.leaves(rest), jax.tree.structure(rest)


def _describe(state: PyTree) -> str:
    if isinstance(state, tuple):
        return f"a tuple of {len(state)}"
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
    return f"a {type(state).__name__} with leaves of shapes {shapes}"
