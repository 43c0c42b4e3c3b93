import itertools
from collections.abc import Callable, Hashable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._trees import vary_together
from ._arguments import check_token, checked_sequence, describe_state
from ._linear import AbstractLinear
from ._protocol import Length, Reset
from ._separate import SeparateLinears, is_separate, separate
from ._stack import AbstractStack, Layer, Remat, check_remat, checked_layers, scan_layer
from .mlps import Routes


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
        check_remat("Stacked", remat)
        layers = checked_layers("Stacked", layers)
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
        arrays, linears, rest = _parts(self.layers)
        return tuple(
            _whole(_unstacked(arrays, i), linears, rest, lambda maps, i=i: maps.linears[i])
            for i in range(self.n_layer)
        )

    def separate(self) -> "Stacked":
        """Returns the same stack with the weights of linear maps in an array for each layer.

        `step` then reads every weight where it is, instead of copying it out of the stack. Decoding
        becomes about as fast as with [`mamba_eqx.Unrolled`][], and there is still one layer to
        compile. [`mamba_eqx.generate`][] and the other functions that decode do this for every
        model. Do it for a loop of your own around `model.step`:

        ```python
        model = eqx.tree_at(lambda model: model.layers, model, model.layers.separate())
        ```

        **Returns:**

        A stack that computes the same function, for inference: checkpoints and optimisers do not
        know its parameters, which have other paths. They share the memory of the stack. Where they
        cannot, which is on accelerators, under `jax.jit` and for weights whose size is not a
        multiple of 64 bytes, the weights remain stacked.
        """
        is_linear = lambda node: isinstance(node, AbstractLinear)
        layers = jax.tree.map(
            lambda node: separate(node) if is_linear(node) else node, self.layers, is_leaf=is_linear
        )
        return eqx.tree_at(lambda stack: stack.layers, self, layers)

    def init_state(self, *, max_len: int | None = None) -> PyTree:
        """Returns the layers' initial states, stacked along a new first axis."""
        arrays, linears, rest = _parts(self.layers)

        def make(arrays: PyTree) -> PyTree:
            return _whole(arrays, linears, rest, lambda maps: maps).init_state(max_len=max_len)

        return jax.vmap(make)(arrays)

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
        return self._scan(x, state, reset, length, with_routes=False)[:2]

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
        return self._scan(x, state, reset, length, with_routes=True)

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

        scan = scan_layer(self.remat)

        def run(layer: Layer, x: Array, _: PyTree) -> tuple[Array, Array]:
            y, *_ = scan(layer, x, None, reset, length)
            return y, y

        return self._loop(run, x, None)[1]

    def _scan(
        self, x: Array, state: PyTree, reset: Reset, length: Length, *, with_routes: bool
    ) -> tuple[Array, PyTree, tuple[Routes, ...]]:
        scan = scan_layer(self.remat, with_routes=with_routes)

        def run(layer: Layer, x: Array, state: PyTree) -> tuple[Array, PyTree]:
            y, *rest = scan(layer, x, state, reset, length)
            return y, rest

        y, (state, stacked) = self._loop(run, x, state)
        routes = [_unstacked(stacked, i) for i in range(self.n_layer)]
        return y, state, tuple(itertools.chain(*routes))

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
        arrays, linears, rest = _parts(self.layers)
        if any(jnp.shape(leaf)[:1] != (self.n_layer,) for leaf in jax.tree.leaves(state)):
            raise ValueError(
                f"The state of a `Stacked` of {self.n_layer} layers must have a first axis of "
                f"{self.n_layer} in every leaf, but got {describe_state(state)}. "
                "Start from `layer.init_state()`."
            )

        def body(x: Array, inputs: tuple[Array, PyTree, PyTree]) -> tuple[Array, PyTree]:
            i, arrays, state = inputs
            return run(_whole(arrays, linears, rest, lambda maps: maps.of(i)), x, state)

        x, inputs = vary_together((x, (jnp.arange(self.n_layer), arrays, state)))
        return lax.scan(body, x, inputs)


def _parts(layers: Layer) -> tuple[PyTree, PyTree, PyTree]:
    """Splits layers into their stacked arrays, their separate linear maps, and the rest."""
    linears, layers = eqx.partition(layers, is_separate, is_leaf=is_separate)
    arrays, rest = eqx.partition(layers, eqx.is_array)
    return arrays, linears, rest


def _whole(
    arrays: PyTree,
    linears: PyTree,
    rest: PyTree,
    choose: Callable[[SeparateLinears], AbstractLinear],
) -> Layer:
    """Returns the layer that has the given arrays and the chosen linear maps."""
    chosen = jax.tree.map(choose, linears, is_leaf=is_separate)
    return eqx.combine(eqx.combine(arrays, rest), chosen)


def _unstacked(tree: PyTree, i: int) -> PyTree:
    """Returns the part of stacked arrays that belongs to layer `i`."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


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
