"""The layout of the official repository (`state-spaces/mamba`): configs without `model_type`."""

import numpy as np

from ...models import BlockConfig, GatedMLPConfig, LanguageModelConfig
from ._fields import Fields
from ._layout import Layout, Slot, Unstorable
from ._mixers import UNSCALED, UNSCALED_BLOCK, find_mixers, gated_mlp, layer_kind
from ._names import language_model
from ._state_spaces_mixers import ATTENTION, MIXER_NAMES, MIXERS
from ._tables import JSON, Arguments, Row, RowInput, Shared


_EMBEDDING = "backbone.embedding.weight"
_EPS = 1e-5  # The official config has no field for it.
_MLP_MULTIPLE = 128  # The official `GatedMLP` rounds its width up to a multiple of this.


def _read_width(given: RowInput) -> Arguments:
    width = given.fields.natural("d_intermediate", 0)
    return {"d_intermediate": _round_up(width, _MLP_MULTIPLE)}


def _write_width(config: GatedMLPConfig) -> JSON:
    return {"d_intermediate": config.d_intermediate}


def _check_width(config: GatedMLPConfig, _: Shared) -> None:
    if config.d_intermediate % _MLP_MULTIPLE:
        raise Unstorable(
            f"MLPs whose width is not a multiple of {_MLP_MULTIPLE} "
            f"(d_intermediate={config.d_intermediate})"
        )


_MLP = gated_mlp(Row(_read_width, _write_width, _check_width))


def _read_state_spaces(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    shared = Shared(fields.size("d_model"), _EPS)
    n_layer = fields.count("n_layer")
    vocab_size = fields.size("vocab_size")
    multiple = fields.size("pad_vocab_size_multiple", 8)
    rms_norm = fields.flag("rms_norm", True)
    ssm_cfg = Fields(fields.get("ssm_cfg", {}), "`ssm_cfg`")
    kinds = [MIXERS[ssm_cfg.only("layer", list(MIXERS), "Mamba1")].read(ssm_cfg, shared)]
    ssm_cfg.finish()
    attention = fields.indices("attn_layer_idx", n_layer)
    mlp = _MLP.read(fields, shared) if fields.natural("d_intermediate", 0) else None
    if attention:
        attn_cfg = Fields(fields.get("attn_cfg", {}), "`attn_cfg`")
        kinds.append(ATTENTION.read(attn_cfg, shared))
        attn_cfg.finish()
    blocks = [BlockConfig(kind, mlp=mlp, rms_norm=rms_norm, norm_eps=_EPS) for kind in kinds]
    config = LanguageModelConfig(
        vocab_size=vocab_size,
        padded_vocab_size=_round_up(vocab_size, multiple),
        layers=tuple(blocks[i in attention] for i in range(n_layer)),
        tie_embeddings=fields.flag("tie_embeddings", True),
        rms_norm=rms_norm,
        norm_eps=_EPS,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
    )
    # `attn_cfg` is unused without attention, and `fused_add_norm` chooses an implementation.
    fields.ignore(["attn_cfg", "fused_add_norm"])
    # Tools for transformers' checkpoints add fields to official configs as well.
    fields.ignore_common()
    fields.finish()
    return config


def _validate_state_spaces(config: LanguageModelConfig) -> None:
    mixers, block, shared = find_mixers(config), config.layers[0], Shared(config.d_model, _EPS)
    if block.rms_norm != config.rms_norm:
        raise Unstorable(
            "a final norm of another kind than the norms of the layers "
            f"(rms_norm={block.rms_norm} in the layers and {config.rms_norm} at the end)"
        )
    if {block.norm_eps, config.norm_eps} != {_EPS}:
        raise Unstorable(
            f"norms with a `norm_eps` other than {_EPS} "
            f"({block.norm_eps} in the layers and {config.norm_eps} at the end)"
        )
    if isinstance(block.mlp, GatedMLPConfig):
        _MLP.check(block.mlp, shared)
    elif block.mlp is not None:
        raise Unstorable(f"MLPs of the kind {layer_kind(block.mlp)}")
    for row in UNSCALED:
        row.check(config, shared)
    for row in UNSCALED_BLOCK:
        row.check(block, shared)
    if mixers.mixer is not None:
        name = MIXER_NAMES.get(type(mixers.mixer))
        if name is None:
            raise Unstorable(f"{layer_kind(mixers.mixer)} layers")
        MIXERS[name].check(mixers.mixer, shared)
    if mixers.attention is not None:
        ATTENTION.check(mixers.attention, shared)


def _write_state_spaces(config: LanguageModelConfig, _: np.dtype) -> JSON:
    # The official config has no field for the dtype.
    mixers, block = find_mixers(config), config.layers[0]
    ssm_cfg: JSON = {}  # Unused in a model with attention in every layer.
    if mixers.mixer is not None:
        name = MIXER_NAMES[type(mixers.mixer)]
        ssm_cfg = {"layer": name} | MIXERS[name].write(mixers.mixer)
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": len(config.layers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": list(mixers.attention_layers),
        "attn_cfg": {} if mixers.attention is None else ATTENTION.write(mixers.attention),
        "rms_norm": config.rms_norm,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": _multiple(config.vocab_size, config.padded_vocab_size),
        "tie_embeddings": config.tie_embeddings,
        **(_MLP.write(block.mlp) if isinstance(block.mlp, GatedMLPConfig) else {}),
    }


def _multiple(vocab_size: int, padded: int) -> int:
    """Returns a number that `vocab_size` is padded to a multiple of."""
    # The last candidate always fits.
    candidates = [1, 8, 16, *(2**n for n in range(5, 12)), padded]
    return next(multiple for multiple in candidates if _round_up(vocab_size, multiple) == padded)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _name_state_spaces(config: LanguageModelConfig) -> list[Slot]:
    return language_model(config, embedding=_EMBEDDING)


STATE_SPACES = Layout(
    name="state-spaces",
    read_config=_read_state_spaces,
    validate=_validate_state_spaces,
    write_config=_write_state_spaces,
    table=_name_state_spaces,
    embedding=lambda _: _EMBEDDING,
    # The official loader requires the head of a tied model.
    keeps_tied_head=True,
)
