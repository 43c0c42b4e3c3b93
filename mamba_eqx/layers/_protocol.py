import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree


State = TypeVar("State")


class AbstractSequenceLayer(eqx.Module, Generic[State]):
    r"""A causal map over a sequence, with three ways to run it.

    $$(y_t, s_t) = f(x_t, s_{t-1})$$

    | | |
    |---|---|
    | `layer(x)` | the whole sequence from the empty past: training and scoring |
    | `layer.scan(x, state)` | a piece of a sequence, in parallel: prefill, state passing |
    | `layer.step(x, state)` | one token, in time and memory independent of the past: decoding |

    The three are one function, and these laws say so (`tests/test_laws.py` holds every layer of
    this package to them; put a layer of your own into its registry and they hold it as well):

    - *recurrence*: `scan` equals `step` folded over the sequence, in outputs, state and gradients;
    - *splitting*: scanning two pieces, the state handed over, equals scanning them joined;
    - *causality*: a token influences no output before it;
    - *reset*: `scan(x, reset=r)` equals the segments that begin where `r` is true, run apart;
    - *length*: `scan(x, state, length=n)` equals `scan(x[:n], state)`, in the first `n` outputs
        and in the state;
    - *closure*: the states of `init_state`, `scan` and `step` have one structure, and the same
        shapes and dtypes, so that a state is a valid carry of `jax.lax.scan`;
    - *dtype*: `y.dtype == x.dtype`.

    A layer is unbatched: wrap it in `jax.vmap`. Its state is an ordinary pytree value: copy it,
    save it, `vmap` over it, differentiate through it.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init_state(self, *, max_len: int | None = None) -> State:
        """The state that stands for the empty past.

        **Arguments:**

        - `max_len`: the largest number of tokens that will pass, which a layer with a cache needs
            to know. State-space models have no use for it.
        """

    @abc.abstractmethod
    def scan(
        self,
        x: Float[Array, "seq {self.d_model}"],
        state: State | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq {self.d_model}"], State]:
        """Runs a piece of a sequence, in parallel over time where the layer can.

        **Arguments:**

        - `x`: the piece.
        - `state`: what came before it; the empty past if `None`. (Layers that have to know a
            `max_len` then take that of `x`.)
        - `reset`: where true, everything before that token is forgotten, so that several
            documents can be packed into one sequence.
        - `length`: only the first `length` tokens are real, the others are padding. The state
            returned is the one after the real ones; outputs after them mean nothing.

        **Returns:**

        The outputs and the state after the last (real) token.
        """

    @abc.abstractmethod
    def step(
        self, x: Float[Array, " {self.d_model}"], state: State
    ) -> tuple[Float[Array, " {self.d_model}"], State]:
        """Runs one token.

        **Arguments:**

        - `x`: the token.
        - `state`: what came before it.

        **Returns:**

        Its output, and the state after it.
        """

    def __call__(
        self,
        x: Float[Array, "seq {self.d_model}"],
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq {self.d_model}"]:
        """Runs a whole sequence: the outputs of `scan` from the empty past.

        **Arguments:**

        - `x`, `reset`, `length`: as for `scan`.
        - `key`: ignored; accepted so that the layer fits into `equinox.nn.Sequential`.
        """
        y, _ = self.scan(x, reset=reset, length=length)
        return y


class AbstractCache(eqx.Module):
    """A state, or a part of one, that has room for a number of tokens and then is full.

    Without such a state a layer runs for ever; with one, whoever knows how many tokens are to come
    reserves room for them, as [`mamba_eqx.generate`][] does.
    """

    @abc.abstractmethod
    def with_room(self, max_len: int) -> "AbstractCache":
        """The same cache with room for at least `max_len` tokens, the ones in it included. It may
        be that of a batch, or of a [`mamba_eqx.Stacked`][]."""


def with_room(state: PyTree, max_len: int) -> PyTree:
    """A state of any layer, with room for at least `max_len` tokens in all its caches."""

    def is_cache(node: Any) -> bool:
        return isinstance(node, AbstractCache)

    def enlarged(node: Any) -> Any:
        return node.with_room(max_len) if isinstance(node, AbstractCache) else node

    return jax.tree.map(enlarged, state, is_leaf=is_cache)


RECURRENCE: Mapping[str, str] = MappingProxyType({"mamba_eqx": "recurrence"})
"""The metadata of a field that holds a parameter of the recurrence itself: `A_log`, `D`, `dt_bias`.

```python
class MyMixer(mbx.AbstractSequenceLayer):
    A_log: Float[Array, "..."] = eqx.field(metadata=mbx.RECURRENCE)
```

Such a parameter is compounded over the whole sequence. It therefore stays in float32 when the
model is cast below that ([`mamba_eqx.cast`][]), and is not decayed in training
([`mamba_eqx.recurrence_mask`][]).
"""


def recurrence_mask(tree: PyTree) -> PyTree[bool]:
    """Which leaves of a model are parameters of a recurrence (`A_log`, `D`, `dt_bias`).

    They stay in float32 in a bfloat16 model, and get no weight decay. (The official Mamba-1 code
    exempts only `A_log` and `D` from decay, that of Mamba-2 `dt_bias` as well.)

    **Returns:**

    The same tree with `True` in place of those leaves and `False` in place of all others.
    """

    def is_recurrence(path: tuple[Any, ...], _: Any) -> bool:
        node: Any = tree
        found = False
        for key in path:
            if isinstance(key, jax.tree_util.DictKey):
                node = node[key.key]
            elif isinstance(key, jax.tree_util.SequenceKey):
                node = node[key.idx]
            elif isinstance(key, jax.tree_util.GetAttrKey) and isinstance(node, eqx.Module):
                metadata = type(node).__dataclass_fields__[key.name].metadata
                found = found or metadata.items() >= RECURRENCE.items()
                node = getattr(node, key.name)
            else:
                # Inside some other node: it can hold no field of ours that its own class declares.
                break
        return found

    return jax.tree_util.tree_map_with_path(is_recurrence, tree)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Casts the floating-point leaves of a model (or of anything of its structure) to `dtype`.

    The parameters of recurrences (see [`mamba_eqx.recurrence_mask`][]) stay in float32 if `dtype`
    is narrower than that.
    """
    wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)

    def cast_leaf(leaf: Any, recurrence: bool) -> Any:
        if not eqx.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(wide if recurrence else dtype)

    return jax.tree.map(cast_leaf, tree, recurrence_mask(tree))


def path_name(path: tuple[Any, ...]) -> str:
    """The path to a leaf or a node as users read and write it: `layers.layers.3.mixer.A_log`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def repeated(state: PyTree, rows: int) -> PyTree:
    """The state of one sequence as that of a batch: `rows` times the same past."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), state)


# What every layer checks before it runs. Shapes and dtypes are known while tracing, so that none
# of this is left in compiled code.


def check_sequence(
    name: str,
    d_model: int,
    x: Array,
    reset: Array | None = None,
    length: Array | int | None = None,
) -> None:
    if x.ndim == 3:
        raise ValueError(
            f"`{name}.scan` takes one sequence of shape (seq, {d_model}), but got a batch of shape "
            f"{x.shape}. Use `jax.vmap(layer)(x)`."
        )
    if x.ndim != 2:
        raise ValueError(
            f"`{name}.scan` takes a sequence of shape (seq, {d_model}), but got an array of shape "
            f"{x.shape}."
            + (" For a single token use `layer.step(x, state)`." if x.ndim == 1 else "")
        )
    check_features(f"{name}.scan", d_model, x)
    check_reset_and_length(name, x.shape[0], reset, length)


def check_token(name: str, d_model: int, x: Array) -> None:
    if x.ndim != 1:
        raise ValueError(
            f"`{name}.step` takes one token of shape ({d_model},), but got an array of shape "
            f"{x.shape}. For a sequence use `layer.scan(x, state)`, for a batch of tokens "
            "`jax.vmap(layer.step)(x, state)`."
        )
    check_features(f"{name}.step", d_model, x)


def check_reset_and_length(
    name: str, seq: int, reset: Array | None, length: Array | int | None
) -> None:
    if reset is not None and (reset.shape != (seq,) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"`reset` of `{name}` must be a bool array of shape ({seq},), one value per token, "
            f"but got {reset.dtype} of shape {reset.shape}."
        )
    if length is None:
        return
    if jnp.shape(length) != () or not jnp.issubdtype(jnp.result_type(length), jnp.integer):
        raise ValueError(
            f"`length` of `{name}` must be one integer, but got {jnp.result_type(length)} of "
            f"shape {jnp.shape(length)}. For a batch use `jax.vmap`."
        )
    if isinstance(length, int) and not 0 <= length <= seq:
        raise ValueError(f"`length` of `{name}` must be within 0..{seq}, but got length={length}.")


def checked_state(
    layer: AbstractSequenceLayer[State], state: State | None, *, max_len: int | None = None
) -> State:
    """`state` if it is one of `layer`'s own, the empty past if it is `None`."""
    if state is None:
        return layer.init_state(max_len=max_len)
    name = type(layer).__name__
    like = jax.eval_shape(lambda: layer.init_state(max_len=max_len))
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"The state given to `{name}` must be a {type(like).__name__} as `init_state` returns "
            f"it, but got {type(state).__name__}. Start from `layer.init_state()`."
        )
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(got) != want.shape or jnp.result_type(got) != want.dtype:
            raise ValueError(
                f"`state{jax.tree_util.keystr(path)}` given to `{name}` must be {want.dtype} of "
                f"shape {want.shape}, but got {jnp.result_type(got)} of shape {jnp.shape(got)}. "
                "Start from `layer.init_state()`."
            )
    return state


def check_features(name: str, d_model: int, x: Array) -> None:
    if x.shape[-1] != d_model:
        raise ValueError(
            f"`{name}` was made for d_model={d_model} features, but got an array of shape "
            f"{x.shape}: its last axis must be {d_model}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` takes floating-point features, but got {x.dtype}. Cast with `x.astype`."
        )
