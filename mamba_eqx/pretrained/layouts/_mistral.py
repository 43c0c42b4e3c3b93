"""The layout of Mistral's own releases (Codestral): the official model under the name `model`."""

import dataclasses
from types import MappingProxyType
from typing import Any

import numpy as np

from ...formats import CheckpointError
from ...models import BlockConfig, LanguageModelConfig, Mamba2Config
from ._fields import Fields
from ._layout import Entry, Layout
from ._state_spaces import STATE_SPACES


_FLAGS = ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings")


# The fields of a mixer that a config says nothing about: `mistral_inference.mamba` leaves them to
# the defaults of the official `Mamba2`, which are those of our config.
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Mamba2Config)
    if field.name not in ("d_model", "d_inner", "d_ssm", "ngroups")
}


def _read_config(values: object) -> LanguageModelConfig:
    # As `mistral_inference.mamba` makes the official config of it. There, too, nothing is optional.
    fields = Fields(values, "the config")
    fields.only("model_type", ["mamba"], "mamba")
    official = {
        "d_model": fields.size("dim"),
        "n_layer": fields.layers("n_layers"),
        "vocab_size": fields.size("vocab_size"),
        "ssm_cfg": {"layer": "Mamba2", "ngroups": fields.size("n_groups")},
        "pad_vocab_size_multiple": fields.size("pad_vocab_size_multiple"),
    }
    for name in _FLAGS:
        if name not in fields:
            raise fields.error(name, "must be true or false")
        official[name] = fields.flag(name, False)
    fields.finish()
    return STATE_SPACES.read_config(official)


def _write_config(config: LanguageModelConfig, dtype: np.dtype) -> dict[str, Any]:
    for i, layer in enumerate(config.layers):
        if not _is_default(layer) or layer != config.layers[0]:
            raise CheckpointError(
                "The 'mistral' layout has only models of Mamba-2 layers that are alike, and in "
                f"which all but `d_model` and `ngroups` has its default, but layer {i} is {layer}. "
                'Use `layout="state-spaces"` if that fits.'
            )
    official = STATE_SPACES.write_config(config, dtype)
    return {
        "dim": official["d_model"],
        "n_layers": official["n_layer"],
        "vocab_size": official["vocab_size"],
        "n_groups": official["ssm_cfg"]["ngroups"],
        "pad_vocab_size_multiple": official["pad_vocab_size_multiple"],
        **{name: official[name] for name in _FLAGS},
        "model_type": "mamba",
    }


def _is_default(layer: BlockConfig) -> bool:
    mixer = layer.mixer
    return (
        isinstance(mixer, Mamba2Config)
        and all(getattr(mixer, name) == default for name, default in _DEFAULTS.items())
        and mixer.d_ssm == mixer.d_inner == 2 * mixer.d_model
        and layer.d_intermediate is None
    )


def _check(config: LanguageModelConfig) -> None:
    _write_config(config, np.dtype(np.float32))


def _entries(config: LanguageModelConfig) -> list[Entry]:
    return [
        dataclasses.replace(entry, name=f"model.{entry.name}")
        for entry in STATE_SPACES.entries(config)
    ]


MISTRAL = Layout(
    name="mistral",
    read_config=_read_config,
    check=_check,
    write_config=_write_config,
    entries=_entries,
    embedding=lambda config: f"model.{STATE_SPACES.embedding(config)}",
    keeps_tied_head=True,
    renames=MappingProxyType({}),
    head=f"model.{STATE_SPACES.head}",
    config_file="params.json",
    weights_file="consolidated.safetensors",
)
