"""Describing a checkpoint without reading the values of its tensors."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
from jaxtyping import PyTree

from ..formats import CheckpointError
from ..models import (
    AbstractMixerConfig,
    AbstractMLPConfig,
    BlockConfig,
    LanguageModel,
    LanguageModelConfig,
)
from ._assign import assign
from ._checkpoint import Checkpoint
from ._load import loaded_dtype
from .layouts import skeleton


@dataclasses.dataclass(frozen=True)
class Description:
    """A summary of a checkpoint.

    - `where`: how messages refer to the checkpoint.
    - `layout`: the name of its layout.
    - `config`: the config of the model.
    - `parameters`: the number of parameters by part of the model (`embedding`, `layers`, ...).
    - `dtypes`: the number of parameters by the dtype in which they are stored.
    - `weight_bytes`: the size of the loaded parameters in their own dtypes.
    - `state_bytes`, `state_bytes_per_token`: the size of the state of one sequence: the constant
        part, and the part that grows with each token.
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
    def blocks(self) -> list[tuple[int, dict[str, object]]]:
        """The runs of equal consecutive layers: the length of each, and the fields of the layer."""
        runs = [(len([*run]), block) for block, run in itertools.groupby(self.config.layers)]
        return [(count, _fields(block)) for count, block in runs]

    def to_json(self) -> dict[str, object]:
        """Returns the description as a JSON object."""
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
    """Describes a checkpoint.

    **Raises:** `CheckpointError` if the checkpoint cannot be loaded.
    """
    layout, config, tensors = checkpoint.layout, checkpoint.config, checkpoint.tensors
    shapes = skeleton(config)
    try:
        assignments = assign(layout, config, shapes, tensors, floating=True)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    parameters: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    leaves: list[jax.ShapeDtypeStruct] = []
    for assignment in assignments:
        shape, part = assignment.leaf.shape, assignment.path.split(".")[0]
        stored = assignment.parts[0][1].dtype.name
        parameters[part] = parameters.get(part, 0) + math.prod(shape)
        dtypes[stored] = dtypes.get(stored, 0) + math.prod(shape)
        # Wide dtypes can be described even where JAX's 64-bit mode is needed to load them.
        with jax.enable_x64(True):
            dtype = loaded_dtype(assignment, None)
        leaves.append(jax.ShapeDtypeStruct(shape, dtype))
    with jax.enable_x64("float64" in dtypes):
        model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        one, two = (_state_bytes(model, max_len) for max_len in (1, 2))
    return Description(
        where=checkpoint.where,
        layout=layout.name,
        config=config,
        parameters=parameters,
        dtypes=dtypes,
        weight_bytes=_bytes(leaves),
        state_bytes=2 * one - two,
        state_bytes_per_token=two - one,
    )


def _state_bytes(model: LanguageModel, max_len: int) -> int:
    return _bytes(jax.eval_shape(lambda model: model.init_state(max_len=max_len), model))


def _bytes(tree: PyTree[jax.ShapeDtypeStruct]) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _fields(block: BlockConfig) -> dict[str, object]:
    """Returns the fields of a block that a summary shows.

    These are the kind of the mixer, its integer fields, and its other fields that differ from the
    default; the same of the MLP if there is one; and the multiplier of the residuals unless it
    is 1.
    """
    fields: dict[str, object] = _part(block.mixer)
    if block.mlp is not None:
        fields["mlp"] = _part(block.mlp)
    if block.residual_multiplier != 1:
        fields["residual_multiplier"] = block.residual_multiplier
    return fields


def _part(config: AbstractMixerConfig | AbstractMLPConfig) -> dict[str, object]:
    fields: dict[str, object] = {"kind": config.kind}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        if type(value) is int or value != field.default:
            fields[field.name] = _value(value)
    return fields


def _value(value: object) -> object:
    if isinstance(value, AbstractMixerConfig | AbstractMLPConfig):
        return _part(value)
    return [_value(entry) for entry in value] if isinstance(value, tuple) else value
