"""Shared by all layouts: rows and tables of mixers and MLPs, and finding the mixers of a model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from ...models import (
    AbstractMixerConfig,
    AttentionConfig,
    GatedMLPConfig,
    LanguageModelConfig,
    Mamba1Config,
    Mamba2Config,
    Mamba3Config,
)
from ._layout import Unstorable
from ._tables import JSON, Arguments, Row, RowInput, Shared, Table, fixed


def _read_width(given: RowInput) -> Arguments:
    return {"d_model": given.shared.d_model}


# The row of the model's width, which is an argument of every mixer.
D_MODEL: Row[object] = Row(read=_read_width)


def dt_rank(key: str) -> Row[Mamba1Config]:
    """Returns the row of `dt_rank`, in the file possibly `"auto"`: `d_model / 16`, rounded up."""

    def read(given: RowInput) -> Arguments:
        if given.fields.get(key, "auto") == "auto":
            return {"dt_rank": math.ceil(given.shared.d_model / 16)}
        return {"dt_rank": given.fields.size(key)}

    return Row(read=read, write=lambda config: {key: config.dt_rank})


def expand(key: str) -> Row[Mamba1Config | Mamba3Config]:
    """Returns the row of `d_inner`, which is a real multiple of `d_model` in the file."""

    def read(given: RowInput) -> Arguments:
        return {"d_inner": given.fields.multiple_of(given.shared.d_model, key, 2)}

    def write(config: Mamba1Config | Mamba3Config) -> JSON:
        # The official width is `int(expand * d_model)`. The last candidate always gives `d_inner`.
        d_inner, d_model = config.d_inner, config.d_model
        candidates = (d_inner // d_model, d_inner / d_model, (d_inner + 0.5) / d_model)
        return {key: next(value for value in candidates if int(value * d_model) == d_inner)}

    return Row(read=read, write=write)


def whole_expand(key: str) -> Row[Mamba1Config | Mamba2Config]:
    """Returns the row of `d_inner`, which is a whole multiple of `d_model` in the file."""

    def read(given: RowInput) -> Arguments:
        given.fields.size(key, 2)  # Checks that the multiple is an integer.
        return {"d_inner": given.fields.multiple_of(given.shared.d_model, key, 2)}

    def check(config: Mamba1Config | Mamba2Config, _: Shared) -> None:
        if config.d_inner % config.d_model:
            raise Unstorable(
                "mixers whose `d_inner` is not a multiple of `d_model` "
                f"(d_inner={config.d_inner} and d_model={config.d_model})"
            )

    return Row(read=read, write=lambda config: {key: config.d_inner // config.d_model}, check=check)


class Mixers(NamedTuple):
    """The mixers of a model whose layers of one kind are equal.

    - `mixer`: the mixer of the layers without attention, or `None` if there are none.
    - `attention`: the mixer of the layers with attention, or `None` if there are none.
    - `attention_layers`: the indices of the layers with attention.
    """

    mixer: AbstractMixerConfig[Any] | None
    attention: AttentionConfig | None
    attention_layers: tuple[int, ...]


def find_mixers(config: LanguageModelConfig) -> Mixers:
    """Returns the mixers of a model.

    **Raises:** `Unstorable` if two layers of one kind have different mixers, or if layers differ in
    anything other than their mixers.
    """
    block = config.layers[0]
    for i, layer in enumerate(config.layers):
        if replace(layer, mixer=block.mixer) != block:
            raise Unstorable(f"layers that differ (layer 0 is {block}, layer {i} is {layer})")
    attention: list[AttentionConfig] = []
    others: list[AbstractMixerConfig[Any]] = []
    indices: list[int] = []
    for i, layer in enumerate(config.layers):
        if isinstance(layer.mixer, AttentionConfig):
            attention.append(layer.mixer)
            indices.append(i)
        else:
            others.append(layer.mixer)
    return Mixers(
        only_one(others, "mixer") if others else None,
        only_one(attention, "mixer") if attention else None,
        tuple(indices),
    )


_Config = TypeVar("_Config")


def only_one(configs: Sequence[_Config], what: str) -> _Config:
    """Returns the config that all of `configs` are equal to.

    **Raises:** `Unstorable` if two of them differ; `what` is the name of the configs.
    """
    for config in configs:
        if config != configs[0]:
            raise Unstorable(
                f"layers that differ within one kind of {what} ({configs[0]} and {config})"
            )
    return configs[0]


def gated_mlp(width: Row[GatedMLPConfig]) -> Table[GatedMLPConfig]:
    """Returns the table of a gated MLP without biases and multipliers, given the row of its
    width."""
    return Table(
        GatedMLPConfig,
        (
            width,
            fixed("bias", False, "MLPs with biases"),
            fixed("gate_multiplier", 1.0, "MLPs with multipliers"),
            fixed("out_multiplier", 1.0, "MLPs with multipliers"),
        ),
    )


# The rows of the multipliers of a model and of its parts, for layouts that have none.
UNSCALED: tuple[Row[object], ...] = (
    fixed("embedding_multiplier", 1.0, "models with a multiplier of the embedding"),
    fixed("logits_multiplier", 1.0, "models with a multiplier of the logits"),
)
UNSCALED_BLOCK: tuple[Row[object], ...] = (
    fixed("residual_multiplier", 1.0, "blocks with a multiplier of their residuals"),
)
UNSCALED_MAMBA2: tuple[Row[object], ...] = (
    fixed("ssm_multipliers", (1.0,) * 5, "Mamba-2 layers with multipliers"),
)


def layer_kind(config: object) -> str:
    """Returns the name of a kind of mixer or MLP for messages, such as "Mamba3"."""
    return type(config).__name__.removesuffix("Config")
