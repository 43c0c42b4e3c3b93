"""Checkpoints whose weights are quantised: the field of the config, and the shapes of the model."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from .._trees import path_name
from ..formats import CheckpointError, quote_value
from ..layers import Linear, QuantizedLinear
from ..models import LanguageModel, LanguageModelConfig, Quantization, linear_maps
from .layouts import Layout, quantized_paths, skeleton


FIELD = "quantization_config"

# The key has another name than transformers' own `quant_method`: transformers would warn about a
# method that it does not know, and then read integers as weights. Without the key it refuses.
_FORMAT, _NAME = "format", "mamba_eqx"


def split_quantization(values: object) -> tuple[object, Quantization | None]:
    """Takes the field of this library's quantised weights out of the content of a config file.

    **Arguments:**

    - `values`: the content of the config file.

    **Returns:**

    The content without the field, and what the field says. A field of another library is left,
    and refused with the rest of the config.

    **Raises:** `CheckpointError` if the field is that of this library, but is not valid.
    """
    field = values.get(FIELD) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(field, dict) or _FORMAT not in field:
        return values, None
    if field[_FORMAT] != _NAME or field.keys() != {_FORMAT, "bits", "group"}:
        raise CheckpointError(
            f"`{FIELD}` of the config must have `{_FORMAT}` {_NAME!r}, `bits` and `group`, and "
            f"nothing else, but is {quote_value(field)}. Save the checkpoint again with this "
            "version of the library, or use the checkpoint that it was made from."
        )
    try:
        found = Quantization(field["bits"], field["group"])
    except ValueError as error:
        raise CheckpointError(f"`{FIELD}` of the config: {error}") from None
    return {key: value for key, value in values.items() if key != FIELD}, found


def quantization_fields(quantization: Quantization) -> dict[str, object]:
    """Returns the fields of a config file that `split_quantization` reads."""
    field = {_FORMAT: _NAME, "bits": quantization.bits, "group": quantization.group}
    return {FIELD: field}


def quantization_of(model: LanguageModel) -> Quantization | None:
    """Returns how a model is quantised, or `None` if it is not.

    **Raises:** `CheckpointError` if its maps do not have the same bits and groups.
    """
    maps = linear_maps(model).items()
    quantized = {path: linear for path, linear in maps if isinstance(linear, QuantizedLinear)}
    if not quantized:
        return None
    widest = max(quantized.values(), key=lambda linear: linear.group)
    found = Quantization(8 if widest.bits == 8 else 4, widest.group)
    for path, linear in quantized.items():
        want = found.bits, found.group_of(linear.in_features)
        if (linear.bits, linear.group) != want:
            raise CheckpointError(
                "The quantised maps of a checkpoint must have the same bits and groups, but "
                f"{path} has bits={linear.bits} and group={linear.group} where bits={want[0]} and "
                f"group={want[1]} are expected. Quantise the model with one call of `quantize`."
            )
    return found


def shapes_of(
    layout: Layout,
    config: LanguageModelConfig,
    tensors: Mapping[str, object],
    quantization: Quantization | None,
) -> LanguageModel:
    """Returns the model of a checkpoint with shapes in place of arrays.

    **Arguments:**

    - `layout`, `config`: the layout, and the config of the model.
    - `tensors`: the tensors by their current names. A weight whose scales are among them is
        quantised.
    - `quantization`: how these weights are quantised; `None` if no weight may be.

    **Raises:** `CheckpointError` if no weight is quantised although some should be.
    """
    shapes = skeleton(config)
    if quantization is None:
        return shapes
    paths = quantized_paths(layout, config, shapes, tensors)
    if not paths:
        raise CheckpointError(
            f"the config has a `{FIELD}`, but no weight has scales. Use the config and the weights "
            "of the same model."
        )

    def replaced(path: KeyPath, node: PyTree) -> PyTree:
        if not isinstance(node, Linear) or path_name(path) not in paths:
            return node
        group = quantization.group_of(node.weight.shape[1])
        return node if group is None else _quantized_shapes(node, quantization.bits, group)

    return jax.tree_util.tree_map_with_path(
        replaced, shapes, is_leaf=lambda node: isinstance(node, Linear)
    )


def _quantized_shapes(linear: Linear, bits: int, group: int) -> QuantizedLinear:
    rows, columns = linear.weight.shape
    integers = (rows, columns * bits // 8), jnp.int8 if bits == 8 else jnp.uint8

    def make(linear: Linear) -> QuantizedLinear:
        scale = jnp.zeros((rows, columns // group), linear.dtype)
        return QuantizedLinear(jnp.zeros(*integers), scale, linear.bias)

    return eqx.filter_eval_shape(make, linear)
