"""The layout of Mistral's own releases (Codestral): the official model under the name `model`."""

import dataclasses
from types import MappingProxyType

import numpy as np

from ...models import BlockConfig, LanguageModelConfig, Mamba2Config
from ._fields import Fields
from ._layout import Layout, Slot, Unstorable
from ._state_spaces import STATE_SPACES
from ._tables import JSON


# The fields that both configs have. Mistral's config requires them.
_FLAGS = ("rms_norm", "residual_in_fp32", "fused_add_norm", "tie_embeddings")


# The values of the fields that the config lacks: `mistral_inference.mamba` uses the defaults of the
# official `Mamba2`, which are those of `Mamba2Config`.
_DEFAULTS = MappingProxyType(
    {
        field.name: field.default
        for field in dataclasses.fields(Mamba2Config)
        if field.name not in ("d_model", "d_inner", "d_ssm", "ngroups")
    }
)


def _read_mistral(values: object) -> LanguageModelConfig:
    # `mistral_inference.mamba` builds the same official config, and has no optional fields either.
    fields = Fields(values, "the config")
    fields.only("model_type", ["mamba"], "mamba")
    official: JSON = {
        "d_model": fields.size("dim"),
        "n_layer": fields.count("n_layers"),
        "vocab_size": fields.size("vocab_size"),
        "ssm_cfg": {"layer": "Mamba2", "ngroups": fields.size("n_groups")},
        "pad_vocab_size_multiple": fields.size("pad_vocab_size_multiple"),
    }
    for name in _FLAGS:
        if name not in fields:
            raise fields.error(name, "must be true or false")
        official[name] = fields.flag(name, False)
    fields.ignore_common()
    fields.finish()
    return STATE_SPACES.read_config(official)


def _validate_mistral(config: LanguageModelConfig) -> None:
    for i, layer in enumerate(config.layers):
        if not _is_default(layer) or layer != config.layers[0]:
            raise Unstorable(
                "models other than those of equal Mamba-2 layers with `d_inner = 2 * d_model` and "
                "defaults for all fields except `d_model` and `ngroups` "
                f"(layer {i} is {layer})"
            )
    STATE_SPACES.validate(config)


def _is_default(layer: BlockConfig) -> bool:
    mixer = layer.mixer
    return (
        isinstance(mixer, Mamba2Config)
        and all(getattr(mixer, name) == default for name, default in _DEFAULTS.items())
        and mixer.d_ssm == mixer.d_inner == 2 * mixer.d_model
        and layer.mlp is None
    )


def _write_mistral(config: LanguageModelConfig, dtype: np.dtype) -> JSON:
    official = STATE_SPACES.write_config(config, dtype)
    mixer = config.layers[0].mixer
    assert isinstance(mixer, Mamba2Config)  # As `validate` ensures.
    return {
        "dim": official["d_model"],
        "n_layers": official["n_layer"],
        "vocab_size": official["vocab_size"],
        "n_groups": mixer.ngroups,
        "pad_vocab_size_multiple": official["pad_vocab_size_multiple"],
        **{name: official[name] for name in _FLAGS},
        "model_type": "mamba",
    }


def _name_mistral(config: LanguageModelConfig) -> list[Slot]:
    return [
        dataclasses.replace(slot, name=f"model.{slot.name}") for slot in STATE_SPACES.table(config)
    ]


MISTRAL = Layout(
    name="mistral",
    read_config=_read_mistral,
    validate=_validate_mistral,
    write_config=_write_mistral,
    table=_name_mistral,
    embedding=lambda config: f"model.{STATE_SPACES.embedding(config)}",
    keeps_tied_head=True,
    head=f"model.{STATE_SPACES.head}",
    config_file="params.json",
    weights_file="consolidated.safetensors",
)
