"""The layout of the official repository (`state-spaces/mamba`), whose configs have no type."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ...models import AttentionConfig, BlockConfig, LanguageModelConfig
from ._fields import Fields
from ._layout import Entry, Layout
from ._names import language_model
from ._state_spaces_mixers import (
    EPS,
    READERS,
    WRITERS,
    inexpressible,
    read_attention,
    write_attention,
)


_EMBEDDING = "backbone.embedding.weight"
_MLP_MULTIPLE = 128  # To which the official `GatedMLP` rounds its width up.


def _read_config(values: object) -> LanguageModelConfig:
    fields = Fields(values, "the config")
    d_model = fields.size("d_model")
    n_layer = fields.layers("n_layer")
    vocab_size = fields.size("vocab_size")
    multiple = fields.size("pad_vocab_size_multiple", 8)
    rms_norm = fields.flag("rms_norm", True)
    ssm_cfg = Fields(fields.get("ssm_cfg", {}), "`ssm_cfg`")
    reader = READERS[ssm_cfg.only("layer", list(READERS), "Mamba1")]
    mixer = reader(d_model, ssm_cfg)
    ssm_cfg.finish()
    chosen = fields.indices("attn_layer_idx", n_layer)
    width = _round_up(fields.natural("d_intermediate", 0), _MLP_MULTIPLE)
    kinds = [mixer]
    if chosen:
        attn_cfg = Fields(fields.get("attn_cfg", {}), "`attn_cfg`")
        kinds.append(read_attention(d_model, attn_cfg))
        attn_cfg.finish()
    blocks = [
        BlockConfig(kind, d_intermediate=width or None, rms_norm=rms_norm, norm_eps=EPS)
        for kind in kinds
    ]
    config = LanguageModelConfig(
        vocab_size=vocab_size,
        padded_vocab_size=_round_up(vocab_size, multiple),
        layers=tuple(blocks[i in chosen] for i in range(n_layer)),
        tie_embeddings=fields.flag("tie_embeddings", True),
        rms_norm=rms_norm,
        norm_eps=EPS,
        residual_in_fp32=fields.flag("residual_in_fp32", True),
    )
    # The former says nothing where there is no attention; the latter is an implementation.
    fields.ignore(["attn_cfg", "fused_add_norm"])
    fields.finish()
    return config


def _write_config(config: LanguageModelConfig, dtype: np.dtype) -> dict[str, Any]:
    del dtype  # The official config does not say it.
    block = config.layers[0]
    for i, layer in enumerate(config.layers):
        if replace(layer, mixer=block.mixer) != block:
            raise inexpressible("layers differ", f"layer 0 is {block}, {i} is {layer}")
    mixers = [layer.mixer for layer in config.layers]
    chosen = [i for i, mixer in enumerate(mixers) if isinstance(mixer, AttentionConfig)]
    attention = _only([mixers[i] for i in chosen])
    mixer = _only([mixer for i, mixer in enumerate(mixers) if i not in chosen])
    # With attention in all layers the other config says nothing.
    ssm_cfg: dict[str, Any] = {}
    if mixer is not None:
        layer, write = WRITERS.get(type(mixer), (None, None))
        if layer is None or write is None:
            raise inexpressible("mixer is not one of its own", type(mixer).__name__)
        ssm_cfg = {"layer": layer} | write(mixer)
    if block.rms_norm != config.rms_norm:
        raise inexpressible("layers and end have norms of different kinds", "rms_norm")
    if {block.norm_eps, config.norm_eps} != {EPS}:
        raise inexpressible(
            f"`norm_eps` is not {EPS}",
            f"{block.norm_eps} in the layers and {config.norm_eps} at the end",
        )
    width = block.d_intermediate or 0
    if width % _MLP_MULTIPLE:
        raise inexpressible(
            f"MLP is not a multiple of {_MLP_MULTIPLE} wide", f"d_intermediate={width}"
        )
    return {
        "d_model": config.d_model,
        "d_intermediate": width,
        "n_layer": len(config.layers),
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": chosen,
        "attn_cfg": {} if attention is None else write_attention(attention),
        "rms_norm": config.rms_norm,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": _multiple(config.vocab_size, config.padded_vocab_size),
        "tie_embeddings": config.tie_embeddings,
    }


def _only(mixers: list[Any]) -> Any:
    """The one that all are, or `None` if there are none."""
    for mixer in mixers:
        if mixer != mixers[0]:
            raise inexpressible(
                "layers differ within one kind of mixer", f"{mixers[0]} and {mixer}"
            )
    return mixers[0] if mixers else None


def _check(config: LanguageModelConfig) -> None:
    _write_config(config, np.dtype(np.float32))


def _entries(config: LanguageModelConfig) -> list[Entry]:
    return language_model(config, embedding=_EMBEDDING)


def _multiple(vocab_size: int, padded: int) -> int:
    # The last candidate always fits.
    candidates = [1, 8, 16, *(2**n for n in range(5, 12)), padded]
    return next(multiple for multiple in candidates if _round_up(vocab_size, multiple) == padded)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


STATE_SPACES = Layout(
    name="state-spaces",
    read_config=_read_config,
    check=_check,
    write_config=_write_config,
    entries=_entries,
    embedding=lambda _: _EMBEDDING,
    # The official loader insists on it.
    keeps_tied_head=True,
    renames=MappingProxyType({}),
)
