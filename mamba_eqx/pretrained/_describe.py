"""What there is to say about a checkpoint without reading the values of its tensors."""

import dataclasses
import itertools
import json
import math
from typing import Any

import jax
import numpy as np

from .._trees import path_name
from ..formats import CheckpointError
from ..layers import recurrence_mask
from ..models import BlockConfig, LanguageModel, LanguageModelConfig
from ._checkpoint import Checkpoint
from ._load import loaded_dtype
from .layouts import group_by_leaf, match, skeleton


@dataclasses.dataclass(frozen=True)
class Description:
    """A checkpoint in numbers.

    - `parameters`: how many, by the part of the model.
    - `dtypes`: how many parameters are stored in which.
    - `weight_bytes`: what they take when they are loaded as they are.
    - `state_bytes`, `state_bytes_per_token`: of one sequence.
    """

    where: str
    layout: str
    config: LanguageModelConfig
    parameters: dict[str, int]
    dtypes: dict[str, int]
    weight_bytes: int
    state_bytes: int
    state_bytes_per_token: int

    @property
    def blocks(self) -> list[tuple[int, dict[str, Any]]]:
        """Layers that follow one another and are alike: how many, and what they are."""
        runs = [(len([*run]), block) for block, run in itertools.groupby(self.config.layers)]
        return [(count, _fields(block)) for count, block in runs]

    def to_json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.where,
            "layout": self.layout,
            "parameters": {"total": sum(self.parameters.values()), **self.parameters},
            "dtypes": self.dtypes,
            "weight_bytes": self.weight_bytes,
            "state_bytes": self.state_bytes,
            "state_bytes_per_token": self.state_bytes_per_token,
            "config": json.loads(self.config.to_json()),
        }


def describe(checkpoint: Checkpoint) -> Description:
    """Describes a checkpoint that can be loaded.

    **Raises:** `CheckpointError` for one that cannot.
    """
    config = checkpoint.config
    model = skeleton(config)
    leaves, structure = jax.tree.flatten(model)
    recurrence = jax.tree.leaves(recurrence_mask(model))
    paths = [path for path, _ in jax.tree.leaves_with_path(model)]
    index_of = {path_name(path): index for index, path in enumerate(paths)}
    try:
        found = match(checkpoint.layout, config, model, checkpoint.tensors, floating=True)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    parameters: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for path, parts in group_by_leaf(found).items():
        index = index_of[path]
        leaf, part = leaves[index], str(paths[index][0]).removeprefix(".")
        tensors = [tensor for _, tensor in parts]
        parameters[part] = parameters.get(part, 0) + leaf.size
        dtypes[tensors[0].dtype.name] = dtypes.get(tensors[0].dtype.name, 0) + leaf.size
        # The wide types may be described whether or not they may be loaded.
        with jax.enable_x64(True):
            dtype = loaded_dtype(tensors, None, recurrence[index])
        leaves[index] = jax.ShapeDtypeStruct(leaf.shape, dtype)
    with jax.enable_x64("float64" in dtypes):
        model = jax.tree.unflatten(structure, leaves)
        one, two = (_state_bytes(model, max_len) for max_len in (1, 2))
    return Description(
        where=checkpoint.where,
        layout=checkpoint.layout.name,
        config=config,
        parameters=parameters,
        dtypes=dtypes,
        weight_bytes=_bytes(leaves),
        state_bytes=2 * one - two,
        state_bytes_per_token=two - one,
    )


def _state_bytes(model: LanguageModel, max_len: int) -> int:
    return _bytes(jax.eval_shape(lambda model: model.init_state(max_len=max_len), model))


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _fields(block: BlockConfig) -> dict[str, Any]:
    """All sizes, and whatever else is not as it is by default."""
    fields: dict[str, Any] = {"kind": block.mixer.kind}
    for field in dataclasses.fields(block.mixer):  # pyright: ignore[reportArgumentType]
        value = getattr(block.mixer, field.name)
        if type(value) is int or value != field.default:
            fields[field.name] = value
    if block.d_intermediate is not None:
        fields["d_intermediate"] = block.d_intermediate
    return fields
