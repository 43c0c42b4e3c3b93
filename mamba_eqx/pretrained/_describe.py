"""Describing a checkpoint without reading the values of its tensors."""

import dataclasses
import itertools
import json
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._trees import named_leaves
from ..formats import CheckpointError
from ..layers import MixtureOfExperts
from ..models import (
    AbstractMixerConfig,
    AbstractMLPConfig,
    BlockConfig,
    LanguageModel,
    LanguageModelConfig,
    Quantization,
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
    - `active_parameters`: the number of parameters without those of the experts that a token does
        not choose.
    - `dtypes`: the number of stored values by dtype. A byte with two weights of 4 bits is one
        value, of uint8.
    - `weight_bytes`: the size of the loaded parameters in their own dtypes.
    - `state_bytes`, `state_bytes_per_token`: the size of the state of one sequence: the constant
        part, and the part that grows with each token.
    - `quantization`: how the weights are quantised; `None` if they are not.
    """

    where: str
    layout: str
    config: LanguageModelConfig
    parameters: dict[str, int]
    active_parameters: int
    dtypes: dict[str, int]
    weight_bytes: int
    state_bytes: int
    state_bytes_per_token: int
    quantization: Quantization | None = None

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
            "active_parameters": self.active_parameters,
            "dtypes": self.dtypes,
            "weight_bytes": self.weight_bytes,
            "quantization": None
            if self.quantization is None
            else {"bits": self.quantization.bits, "group": self.quantization.group},
            "state_bytes": self.state_bytes,
            "state_bytes_per_token": self.state_bytes_per_token,
            "config": json.loads(self.config.to_json()),
        }


def describe(checkpoint: Checkpoint) -> Description:
    """Describes a checkpoint.

    **Raises:** `CheckpointError` if the checkpoint cannot be loaded.
    """
    layout, config, tensors = checkpoint.layout, checkpoint.config, checkpoint.tensors
    try:
        shapes = checkpoint.shapes()
        assignments = assign(layout, config, shapes, tensors, floating=True)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.where}: {error}") from None
    parameters: dict[str, int] = {}
    # Counted without the packing and the scales of quantised weights.
    for path, leaf in named_leaves(skeleton(config)).items():
        part = path.split(".")[0]
        parameters[part] = parameters.get(part, 0) + math.prod(leaf.shape)
    dtypes: dict[str, int] = {}
    leaves: list[jax.ShapeDtypeStruct] = []
    for assignment in assignments:
        shape, stored = assignment.leaf.shape, assignment.parts[0][1].dtype.name
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
        active_parameters=sum(parameters.values()) - _idle_parameters(shapes),
        dtypes=dtypes,
        weight_bytes=_bytes(leaves),
        quantization=checkpoint.quantization,
        state_bytes=2 * one - two,
        state_bytes_per_token=two - one,
    )


def _idle_parameters(model: LanguageModel) -> int:
    """Returns the number of parameters of the experts that a token does not choose."""
    is_mixture = lambda node: isinstance(node, MixtureOfExperts)
    idle = 0
    for mixture in filter(is_mixture, jax.tree.leaves(model, is_leaf=is_mixture)):
        n_experts, top_k = mixture.router.n_experts, mixture.router.top_k
        idle += (mixture.fc1.size + mixture.fc2.size) // n_experts * (n_experts - top_k)
    return idle


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


def _part(config: AbstractMixerConfig[Any] | AbstractMLPConfig[Any]) -> dict[str, object]:
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
