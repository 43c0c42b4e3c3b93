import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import equinox as eqx
import jax
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from .._trees import path_name, paths_with_ends
from ..layers import Linear, QuantizedLinear
from ..ops import GROUP_UNIT
from ._config_fields import set_fields
from ._language_model import LanguageModel


_Model = TypeVar("_Model", bound=PyTree)
_Keep: TypeAlias = Sequence[str] | Callable[[str], bool]

HEAD = "lm_head"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How [`mamba_eqx.quantize`][] and [`mamba_eqx.from_pretrained`][] store the weights of linear
    maps.

    **Arguments:**

    - `bits`: the number of bits of a weight, 8 or 4.
    - `group`: the number of consecutive inputs of a map that share a scale, a multiple of 32. A map
        whose number of inputs it does not divide has the largest smaller group that does. If there
        is none, the map is kept as it is.
    - `keep`: the maps to keep as they are, by the ends of their paths, such as `"x_proj"` or
        `"layers.0.mixer.out_proj"`; or a function that returns whether the map at a path is kept.

    **Raises:** `ValueError` if a value is not one of these.
    """

    bits: Literal[8, 4] = 8
    group: int = 64
    keep: _Keep = ()

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in (8, 4):
            raise ValueError(f"`bits` must be 8 or 4, but got bits={self.bits!r}.")
        if type(self.group) is not int or self.group < GROUP_UNIT or self.group % GROUP_UNIT:
            raise ValueError(
                f"`group` must be a multiple of {GROUP_UNIT}, but got group={self.group!r}. "
                "Smaller groups are more accurate and take more memory: try 32, 64 or 128."
            )
        if not callable(self.keep):
            if isinstance(self.keep, str) or not all(isinstance(k, str) for k in self.keep):
                raise ValueError(
                    "`keep` must be a list of names, or a function of a path, but got "
                    f"keep={self.keep!r}. Put names into a list."
                )
            set_fields(self, keep=tuple(self.keep))

    def group_of(self, in_features: int) -> int | None:
        """Returns the size of the groups of a map, or `None` if the map is kept.

        **Arguments:**

        - `in_features`: the number of inputs of the map.

        **Returns:**

        The largest multiple of 32 that divides `in_features` and is at most `group`.
        """
        # A config may ask for a group of any size.
        largest = min(self.group, in_features - in_features % GROUP_UNIT)
        sizes = range(largest, 0, -GROUP_UNIT)
        return next((size for size in sizes if in_features % size == 0), None)

    def select(self, in_features: dict[str, int]) -> dict[str, int]:
        """Returns the maps to quantise, and the size of their groups.

        **Arguments:**

        - `in_features`: the numbers of inputs of all maps of a model, by path.

        **Returns:**

        The size of the groups of each map that is not kept, by path.

        **Raises:** `ValueError` if no map is left, or a name in `keep` is not the end of a path.
        """
        if callable(self.keep):
            kept = {path for path in in_features if self.keep(path)}
        else:
            kept = paths_with_ends("keep", self.keep, in_features, what="linear maps")
        groups = {path: self.group_of(size) for path, size in in_features.items()}
        found = {path: group for path, group in groups.items() if group and path not in kept}
        if not found:
            raise ValueError(
                "There must be at least one linear map to quantise, with a number of inputs that "
                f"is a multiple of {GROUP_UNIT}, but `keep` and the sizes leave none. The model "
                f"has {_described(in_features)}."
            )
        return found


def quantize(
    model: _Model, *, bits: Literal[8, 4] = 8, group: int = 64, keep: _Keep = ()
) -> _Model:
    r"""Rounds the weights of the linear maps of a model to 8 or 4 bits,

    $$W_{oi} \approx s_{o,g(i)}\, q_{oi},$$

    where every group $g$ of consecutive inputs shares a scale $s$. The model has the same methods
    and obeys the same laws. The maps take a little more than a quarter, or an eighth, of the memory
    that they take in float32. See [`mamba_eqx.ops.quantize_weight`][] for how the integers and the
    scales are chosen.

    ```python
    config = mbx.LanguageModelConfig(256, (mbx.BlockConfig(mbx.Mamba1Config(64)),))
    model = config.build(key=jax.random.key(0))
    small = mbx.quantize(model, bits=4, keep=["x_proj"])
    ```

    All maps of the type [`mamba_eqx.layers.Linear`][] are rounded, and become
    [`mamba_eqx.layers.QuantizedLinear`][]s. Everything else keeps its dtype: embeddings, norms,
    convolutions, the parameters of recurrences, routers, and the experts of a
    [`mamba_eqx.MixtureOfExperts`][] (though not its shared expert). A head that is tied to the
    embedding becomes one of its own, because decoding reads the whole head for every token, but
    only one row of the embedding.

    [`mamba_eqx.LanguageModelConfig.of`][] returns the config of the model before it was quantised,
    with a head of its own. To load a checkpoint without ever having it in float32, use the option
    `quantize` of [`mamba_eqx.from_pretrained`][].

    **Arguments:**

    - `model`: a model, or any pytree that contains linear maps.
    - `bits`, `group`, `keep`: see [`mamba_eqx.Quantization`][]. The head has the path `"lm_head"`,
        even if it is tied.

    **Returns:**

    The model with quantised maps.

    **Raises:** `ValueError` if the model is quantised already, a value is not valid, a name in
    `keep` is not the end of the path of a map, or no map is left to quantise.
    """
    options = Quantization(bits, group, keep)
    maps = linear_maps(model)
    done = [path for path, linear in maps.items() if isinstance(linear, QuantizedLinear)]
    if done:
        raise ValueError(
            f"The model must not be quantised already, but {_described(done)} of it have "
            "integers for weights. Quantise the original model instead."
        )
    heads = _tied_heads(model)
    sizes = {path: linear.weight.shape[-1] for path, linear in maps.items()}
    groups = options.select(sizes | {path: m.d_model for path, m in heads.items()})

    def untied(path: KeyPath, node: PyTree) -> PyTree:
        if isinstance(node, LanguageModel) and _head_path(path) in groups.keys() & heads.keys():
            return with_head(node, Linear.of(node.embedding.weight))
        return node

    def quantized(path: KeyPath, node: PyTree) -> PyTree:
        if not isinstance(node, Linear) or path_name(path) not in groups:
            return node
        return QuantizedLinear.of(node, bits=bits, group=groups[path_name(path)])

    model = jax.tree_util.tree_map_with_path(untied, model, is_leaf=_is_model)
    return jax.tree_util.tree_map_with_path(quantized, model, is_leaf=_is_map)


def linear_maps(tree: PyTree) -> dict[str, Linear | QuantizedLinear]:
    """Returns the linear maps of a tree, by path."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_map)
    return {path_name(path): node for path, node in nodes if _is_map(node)}


def with_head(model: LanguageModel, head: Any) -> LanguageModel:
    """Returns a model with another head than the one that is tied to its embedding."""
    return eqx.tree_at(lambda m: m.lm_head, model, head, is_leaf=lambda leaf: leaf is None)


def _tied_heads(tree: PyTree) -> dict[str, LanguageModel]:
    """Returns the language models in a tree whose head is tied, by the path of the head."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_model)
    return {
        _head_path(path): node for path, node in nodes if _is_model(node) and node.lm_head is None
    }


def _head_path(path: KeyPath) -> str:
    return f"{path_name(path)}.{HEAD}".removeprefix(".")


def _is_map(node: object) -> bool:
    return isinstance(node, Linear | QuantizedLinear)


def _is_model(node: object) -> bool:
    return isinstance(node, LanguageModel)


def _described(paths: Iterable[str]) -> str:
    names = list(paths)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "no linear maps"
