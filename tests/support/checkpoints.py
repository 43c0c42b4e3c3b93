"""The models that checkpoint tests store, and helpers for making, comparing and editing them."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

import mamba_eqx as mbx


ODD = mbx.Mamba1Config(d_model=6, d_inner=9, d_state=3, d_conv=5, dt_rank=2)
BIASED = mbx.Mamba1Config(d_model=6, bias=True, conv_bias=False)


def config(
    mixer: mbx.models.AbstractMixerConfig = ODD,
    *,
    d_intermediate: int | None = None,
    rms_norm: bool = True,
    norm_eps: float = 1e-5,
    n_layer: int = 2,
    **fields: Any,
) -> mbx.LanguageModelConfig:
    """Returns the config of a small model whose layers are all alike."""
    mlp = None if d_intermediate is None else mbx.GatedMLPConfig(d_intermediate)
    block = mbx.BlockConfig(mixer, mlp=mlp, rms_norm=rms_norm, norm_eps=norm_eps)
    return mbx.LanguageModelConfig(
        13, (block,) * n_layer, rms_norm=rms_norm, norm_eps=norm_eps, **fields
    )


def mamba2(**fields: Any) -> mbx.Mamba2Config:
    """Returns the config of a Mamba-2 mixer whose sizes are all different."""
    sizes = {"d_model": 6, "d_inner": 18, "d_state": 5, "d_conv": 3, "headdim": 3, "ngroups": 2}
    return mbx.Mamba2Config(**{**sizes, **fields})


def mamba3(**fields: Any) -> mbx.Mamba3Config:
    """Returns the config of a Mamba-3 mixer whose sizes are all different."""
    sizes = {"d_model": 6, "d_inner": 18, "d_state": 5, "headdim": 3, "ngroups": 2}
    return mbx.Mamba3Config(**{**sizes, **fields})


def attention(**fields: Any) -> mbx.AttentionConfig:
    """Returns the config of a small attention mixer."""
    heads: dict[str, Any] = {"nheads": 4, "nheads_kv": 2, "headdim": 8}
    return mbx.AttentionConfig(6, **(heads | fields))


def hybrid(
    *mixers: mbx.models.AbstractMixerConfig, d_intermediate: int | None = 9, **fields: Any
) -> mbx.LanguageModelConfig:
    """Returns the config of a model with one layer for each mixer."""
    mlp = None if d_intermediate is None else mbx.GatedMLPConfig(d_intermediate)
    blocks = [mbx.BlockConfig(mixer, mlp=mlp) for mixer in mixers]
    return mbx.LanguageModelConfig(13, tuple(blocks), **fields)


def nemotron_h(
    *layers: tuple[mbx.models.AbstractMixerConfig, mbx.models.AbstractMLPConfig | None],
    norm_eps: float = 1e-5,
    **fields: Any,
) -> mbx.LanguageModelConfig:
    """Returns the config of an untied model, given the mixer and the MLP of each layer."""
    blocks = [mbx.BlockConfig(mixer, mlp=mlp, norm_eps=norm_eps) for mixer, mlp in layers]
    return mbx.LanguageModelConfig(
        13, tuple(blocks), tie_embeddings=False, norm_eps=norm_eps, **fields
    )


# Mamba-2 whose width is no multiple of that of the model.
NEMOTRON_MAMBA2 = mamba2(d_inner=15, ngroups=5, dt_limit=(0.05, 0.6))
# Experts with every field of Nemotron 3 off its default.
EXPERTS = mbx.MixtureOfExpertsConfig(
    7,
    n_experts=6,
    top_k=3,
    routing="sigmoid",
    n_group=3,
    topk_group=2,
    renormalise=False,
    scaling=2.5,
    gated=False,
    d_shared=5,
)
# Mamba-1 as Jamba has it, with normalised dt, B and C.
NORMALISED = mbx.Mamba1Config(
    6, d_state=3, d_conv=3, dt_rank=2, select_norm="weighted", select_norm_eps=1e-5
)
WEIGHTLESS = mbx.Mamba1Config(d_model=6, select_norm="weightless", select_norm_eps=3e-3)
ROTARY = attention(rotary_emb_dim=4, rotary_emb_base=50.0)
# Attention with every field of `attn_cfg` off its default.
OFFICIAL = attention(
    d_conv=3,
    rotary_emb_dim=6,
    rotary_emb_base=50.0,
    rotary_emb_interleaved=True,
    softmax_scale=0.3,
    qkv_proj_bias=True,
)

BOTH = {
    "tied": config(padded_vocab_size=16),
    "untied": config(BIASED, tie_embeddings=False, residual_in_fp32=False),
}
_MAMBA2_BOTH = {
    "tied": config(mamba2(), padded_vocab_size=16),
    "untied": config(mamba2(bias=True, conv_bias=False), tie_embeddings=False),
    "lower_limit": config(mamba2(dt_limit=(0.25, math.inf))),
    "limits": config(mamba2(dt_limit=(0.25, 0.75)), residual_in_fp32=False),
}


GATED = mbx.GatedMLPConfig(9)
GRANITE_EXPERTS = mbx.MixtureOfExpertsConfig(7, n_experts=5, top_k=3, d_shared=9)


def granite(
    *mixers: mbx.models.AbstractMixerConfig,
    mlp: mbx.models.AbstractMLPConfig = GATED,
    logits_multiplier: float = 1 / 6,
    **fields: Any,
) -> mbx.LanguageModelConfig:
    """Returns the config of a model with multipliers, and one layer for each mixer."""
    blocks = [mbx.BlockConfig(mixer, mlp=mlp, residual_multiplier=0.22) for mixer in mixers]
    return mbx.LanguageModelConfig(
        13,
        tuple(blocks),
        embedding_multiplier=12.0,
        logits_multiplier=logits_multiplier,
        **fields,
    )


def falcon_h1(
    mamba: mbx.Mamba2Config,
    heads: mbx.AttentionConfig,
    *,
    scales: tuple[float, ...] = (0.6, 1.4),
    mlp_bias: bool = False,
    **fields: Any,
) -> mbx.LanguageModelConfig:
    """Returns the config of a model with Mamba-2 and attention side by side, and multipliers."""
    mlp = mbx.GatedMLPConfig(9, bias=mlp_bias, gate_multiplier=0.7, out_multiplier=1.3)
    block = mbx.BlockConfig(mbx.ParallelConfig((mamba, heads), scales=scales), mlp=mlp)
    return mbx.LanguageModelConfig(
        13, (block,) * 2, embedding_multiplier=5.7, logits_multiplier=0.4, **fields
    )


# Mamba-2 as Falcon-H1 has it: a width of its own, multipliers, and a gate without a norm.
MULTIPLIED = mamba2(
    d_inner=15, ngroups=5, rms_norm=False, ssm_multipliers=(0.4, 0.2, 0.7, 0.5, 1.3)
)
# Attention with a softmax scale of its own: without positions, and rotated as a whole.
NOPE = attention(softmax_scale=0.3)
WHOLE = attention(rotary_emb_dim=8, rotary_emb_base=50.0, softmax_scale=0.3)

# The models of each family by layout and name.
Models = Mapping[str, Mapping[str, mbx.LanguageModelConfig]]

MAMBA1: Models = {
    "transformers": BOTH | {"eps": config(norm_eps=3e-4)},
    "state-spaces": BOTH
    | {
        "mlp": config(d_intermediate=256),
        "layer_norm": config(d_intermediate=128, rms_norm=False),
        "padded_oddly": config(padded_vocab_size=50),
    },
}
FALCON_MAMBA: Models = {"transformers": {"tied": config(WEIGHTLESS, padded_vocab_size=16)}}
MAMBA2: Models = {
    "transformers": _MAMBA2_BOTH | {"eps": config(mamba2(norm_eps=3e-4), norm_eps=3e-4)},
    "state-spaces": _MAMBA2_BOTH
    | {
        "mlp": config(mamba2(), d_intermediate=128),
        "per_channel": config(mamba2(D_has_hdim=True, norm_before_gate=True)),
        "without_norm": config(mamba2(rms_norm=False)),
        "d_ssm": config(mamba2(d_ssm=12, bias=True)),
    },
}
MAMBA3: Models = {
    "state-spaces": {
        "siso": config(mamba3(), padded_vocab_size=16),
        "mimo": config(
            mamba3(
                mimo_rank=2,
                rope_fraction=1.0,
                A_activation="softplus",
                A_floor=0.25,
                outproj_norm=True,
            ),
            tie_embeddings=False,
        ),
        "mlp": config(mamba3(d_inner=15, ngroups=5, mimo_rank=1), d_intermediate=128),
    }
}
JAMBA_EXPERTS = mbx.MixtureOfExpertsConfig(9, n_experts=5, top_k=3, routing="softmax")
HYBRIDS: Models = {
    "transformers": {
        "bamba": hybrid(mamba2(), ROTARY, mamba2(), padded_vocab_size=16),
        "bamba_bias": hybrid(
            mbx.AttentionConfig(
                6,
                nheads=3,
                nheads_kv=1,
                rotary_emb_dim=2,
                qkv_proj_bias=True,
                out_proj_bias=True,
            ),
            mamba2(),
            tie_embeddings=False,
            residual_in_fp32=False,
        ),
        "no_attention": hybrid(mamba2(), mamba2()),
        "jamba": hybrid(
            NORMALISED, attention(nheads=3, nheads_kv=3, headdim=2), NORMALISED, NORMALISED
        ),
        "granite": granite(mamba2(), NOPE, mamba2(), padded_vocab_size=16),
        "granite_rope": granite(
            attention(rotary_emb_dim=8, qkv_proj_bias=True, out_proj_bias=True),
            mamba2(bias=True, dt_limit=(0.25, 0.75)),
            # This number is the reciprocal of no other number.
            logits_multiplier=1.9,
            tie_embeddings=False,
            residual_in_fp32=False,
        ),
        "granite_attention": granite(WHOLE, WHOLE),
        "granite_mamba": granite(mamba2(), mamba2()),
        "granite_experts": granite(mamba2(), NOPE, mlp=GRANITE_EXPERTS),
        "granite_equal_experts": granite(
            mamba2(), mamba2(), mlp=GRANITE_EXPERTS, logits_multiplier=1.0, tie_embeddings=False
        ),
        "falcon_h1": falcon_h1(
            MULTIPLIED, attention(rotary_emb_dim=8, rotary_emb_base=1e11), padded_vocab_size=16
        ),
        "falcon_h1_norm": falcon_h1(
            mamba2(norm_before_gate=True, bias=True, conv_bias=False, dt_limit=(0.25, 0.75)),
            # This scale is the product of no number with the usual scale.
            attention(
                headdim=6,
                rotary_emb_dim=6,
                softmax_scale=0.42,
                qkv_proj_bias=True,
                out_proj_bias=True,
            ),
            mlp_bias=True,
            tie_embeddings=False,
            residual_in_fp32=False,
        ),
        "jamba_experts": mbx.LanguageModelConfig(
            13,
            tuple(
                mbx.BlockConfig(mixer, mlp=mlp)
                for mixer, mlp in (
                    (NORMALISED, mbx.GatedMLPConfig(9)),
                    (NORMALISED, JAMBA_EXPERTS),
                    (attention(), mbx.GatedMLPConfig(9)),
                    (NORMALISED, JAMBA_EXPERTS),
                )
            ),
        ),
        "jamba_untied": hybrid(*[NORMALISED, NORMALISED, attention()] * 2, tie_embeddings=False),
        "nemotron_h": nemotron_h(
            (NEMOTRON_MAMBA2, mbx.MLPConfig(9)),
            (NEMOTRON_MAMBA2, None),
            (attention(), mbx.MLPConfig(9)),
            (NEMOTRON_MAMBA2, None),
            (attention(), None),
            padded_vocab_size=16,
        ),
        "nemotron_h_bias": nemotron_h(
            (
                mamba2(d_inner=15, ngroups=5, bias=True, conv_bias=False, norm_eps=3e-4),
                mbx.MLPConfig(5, bias=True),
            ),
            (attention(nheads=3, nheads_kv=1), mbx.MLPConfig(5, bias=True)),
            norm_eps=3e-4,
            residual_in_fp32=False,
        ),
        "nemotron_h_experts": nemotron_h(
            (NEMOTRON_MAMBA2, EXPERTS), (attention(), EXPERTS), (attention(), mbx.MLPConfig(9))
        ),
        "nemotron_h_latent": nemotron_h(
            (attention(), None),
            (
                NEMOTRON_MAMBA2,
                dataclasses.replace(EXPERTS, d_latent=4, n_group=1, topk_group=1, renormalise=True),
            ),
        ),
    },
    "state-spaces": {
        "mamba2": hybrid(mamba2(), OFFICIAL, mamba2(), d_intermediate=None, padded_vocab_size=16),
        "mamba1_mlp": hybrid(ROTARY, mbx.Mamba1Config(6), d_intermediate=128),
        "attention_alone": hybrid(ROTARY, ROTARY, d_intermediate=None, tie_embeddings=False),
    },
}
MISTRAL: Models = {
    "mistral": {
        # Like Codestral: untied, with several groups.
        "untied": config(mbx.Mamba2Config(d_model=64, ngroups=2), n_layer=1, tie_embeddings=False),
        "tied": config(
            mbx.Mamba2Config(d_model=32), padded_vocab_size=16, residual_in_fp32=False, n_layer=1
        ),
    }
}
FAMILIES: Mapping[str, Models] = {
    "mamba1": MAMBA1,
    "falcon_mamba": FALCON_MAMBA,
    "mamba2": MAMBA2,
    "mamba3": MAMBA3,
    "hybrid": HYBRIDS,
    "mistral": MISTRAL,
}


class Stored(NamedTuple):
    """A model of the registry, and the layout that stores it."""

    layout: str
    family: str
    name: str
    config: mbx.LanguageModelConfig

    @property
    def stackable(self) -> bool:
        """Whether all layers are alike, as `Stacked` needs them to be."""
        return len(set(self.config.layers)) == 1


STORED = [
    Stored(layout, family, name, config)
    for family, layouts in FAMILIES.items()
    for layout, models in layouts.items()
    for name, config in models.items()
]


@functools.cache
def make(config: mbx.LanguageModelConfig, dtype: Any = None, **how: bool) -> mbx.LanguageModel:
    """Builds a model with random values everywhere, so that no two arrays can be confused."""
    shapes = eqx.filter_eval_shape(lambda: config.build(key=jr.key(0), dtype=dtype, **how))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape).astype(x.dtype)), shapes)


def assert_same(got: PyTree, want: PyTree) -> None:
    """Asserts that two trees have the same structure, dtypes and values."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        assert np.array_equal(a, b), jax.tree_util.keystr(path)


# In `edit_config`, removes a field.
DROPPED = object()


def edit_config(folder: Path, fields: Mapping[str, object], file: str = "config.json") -> None:
    """Sets fields of a saved config, or removes those that are `DROPPED`.

    A key such as `"attn_cfg.causal"` names a field of an object within the config.
    """
    values = json.loads((folder / file).read_text())
    for key, value in fields.items():
        *outer, name = key.split(".")
        inner = values
        for part in outer:
            inner = inner[part]
        if value is DROPPED:
            inner.pop(name, None)
        else:
            inner[name] = value
    (folder / file).write_text(json.dumps(values))


def save_edited(
    config: mbx.LanguageModelConfig, folder: Path, layout: str, fields: Mapping[str, object]
) -> Path:
    """Saves a model, edits fields of its config (see `edit_config`), and returns the folder."""
    mbx.save_pretrained(make(config), folder, layout=layout)
    edit_config(folder, fields)
    return folder
