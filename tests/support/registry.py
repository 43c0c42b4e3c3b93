"""The registry of layers that `tests/laws` checks, one entry per layer.

Add your own layer to `MIXERS` (checked in all sizes and dtypes) or `COMPOSITES` (in one size).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mamba_eqx as mbx


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a layer. They differ from one another, so that mixing up two axes fails."""

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    flag: bool
    """The value of options such as `bias`."""


SIZES = [
    Sizes(d_model=5, d_inner=7, d_state=3, d_conv=4, dt_rank=2, flag=True),
    Sizes(d_model=6, d_inner=4, d_state=8, d_conv=2, dt_rank=3, flag=False),
    Sizes(d_model=1, d_inner=1, d_state=1, d_conv=1, dt_rank=1, flag=True),
]

Make = Callable[[Sizes, Any, jax.Array], Any]


def mamba1(s: Sizes, dtype: Any, key: jax.Array, **options: Any) -> mbx.Mamba1:
    return mbx.Mamba1(
        s.d_model,
        d_inner=s.d_inner,
        d_state=s.d_state,
        d_conv=s.d_conv,
        dt_rank=s.dt_rank,
        bias=s.flag,
        conv_bias=s.flag,
        dtype=dtype,
        key=key,
        **options,
    )


def mamba1_normed(select_norm: str) -> Make:
    return functools.partial(mamba1, select_norm=select_norm, select_norm_eps=0.07)


def mamba2(*, ngroups: int, heads_per_group: int, d_mlp: int = 0, **options: Any) -> Make:
    """Returns a maker of `Mamba2`, with `dt_rank` as `headdim` and `d_mlp` channels of the MLP."""

    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.Mamba2:
        d_ssm = ngroups * heads_per_group * s.dt_rank
        return mbx.Mamba2(
            s.d_model,
            d_inner=d_ssm + d_mlp,
            d_ssm=d_ssm,
            d_state=s.d_state,
            d_conv=s.d_conv,
            headdim=s.dt_rank,
            ngroups=ngroups,
            bias=s.flag,
            conv_bias=s.flag,
            dtype=dtype,
            key=key,
            **options,
        )

    return make


def attention(*, nheads_kv: int, shared: int, **options: Any) -> Make:
    """Returns a maker of `Attention`, with `dt_rank` for the size of the heads and, if `window` is
    set, `d_state` as the window."""

    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.Attention:
        window: dict[str, Any] = {"window": s.d_state} if options.get("window") else {}
        return mbx.Attention(
            s.d_model,
            nheads=nheads_kv * shared,
            nheads_kv=nheads_kv,
            headdim=s.dt_rank + 2,
            rotary_emb_dim=2 * (s.dt_rank // 2 + 1),
            rotary_emb_base=30.0,
            qkv_proj_bias=s.flag,
            out_proj_bias=not s.flag,
            dtype=dtype,
            key=key,
            **(options | window),
        )

    return make


def mamba3(*, ngroups: int, heads_per_group: int, **options: Any) -> Make:
    """Returns a maker of `Mamba3`, with `dt_rank` as `headdim` and at least one rotated pair."""

    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.Mamba3:
        return mbx.Mamba3(
            s.d_model,
            d_inner=ngroups * heads_per_group * s.dt_rank,
            d_state=s.d_state + 3,
            headdim=s.dt_rank,
            ngroups=ngroups,
            dtype=dtype,
            key=key,
            **options,
        )

    return make


def gated_delta_net(*, ngroups: int, heads_per_group: int, **options: Any) -> Make:
    """Returns a maker of `GatedDeltaNet`, with `dt_rank` as `headdim`."""

    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.GatedDeltaNet:
        return mbx.GatedDeltaNet(
            s.d_model,
            d_inner=ngroups * heads_per_group * s.dt_rank,
            d_state=s.d_state,
            d_conv=s.d_conv,
            headdim=s.dt_rank,
            ngroups=ngroups,
            dtype=dtype,
            key=key,
            **options,
        )

    return make


def conv(s: Sizes, dtype: Any, key: jax.Array) -> mbx.CausalConv1d:
    return mbx.CausalConv1d(s.d_model, s.d_conv, use_bias=s.flag, dtype=dtype, key=key)


def gated_mlp(s: Sizes, dtype: Any, key: jax.Array) -> mbx.GatedMLP:
    return mbx.GatedMLP(s.d_model, 3, bias=s.flag, dtype=dtype, key=key)


def mixture(**options: Any) -> Make:
    """Returns a maker of `MixtureOfExperts`, with `d_state` as the width of an expert."""

    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.MixtureOfExperts:
        return mbx.MixtureOfExperts(s.d_model, s.d_state, dtype=dtype, key=key, **options)

    return make


def block(mixer: Make, *, mlp: Make | None = None, rms_norm: bool = True) -> Make:
    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.Block:
        mlp_key, mixer_key = jr.split(key)
        return mbx.Block(
            mixer(s, dtype, mixer_key),
            mlp=None if mlp is None else mlp(s, dtype, mlp_key),
            rms_norm=rms_norm,
            dtype=dtype,
        )

    return make


def stack(kind: Callable[..., Any], *layers: Make, **options: Any) -> Make:
    def make(s: Sizes, dtype: Any, key: jax.Array) -> Any:
        keys = jr.split(key, len(layers))
        parts = [layer(s, dtype, k) for layer, k in zip(layers, keys, strict=True)]
        return kind(parts, **options)

    return make


def quantized(layer: Make, bits: Literal[8, 4]) -> Make:
    """Returns a maker of a layer with weights of 8 or 4 bits, in two groups for every output."""

    def make(s: Sizes, dtype: Any, key: jax.Array) -> Any:
        made = layer(dataclasses.replace(s, d_inner=64), dtype, key)
        return mbx.quantize(made, bits=bits, group=32)

    return make


def language_model(layers: Make, *, tie: bool, residual_in_fp32: bool = True) -> Make:
    def make(s: Sizes, dtype: Any, key: jax.Array) -> mbx.LanguageModel:
        layers_key, model_key = jr.split(key)
        return mbx.LanguageModel(
            layers(s, dtype, layers_key),
            vocab_size=VOCAB_SIZE,
            padded_vocab_size=VOCAB_SIZE + 5,
            tie_embeddings=tie,
            residual_in_fp32=residual_in_fp32,
            dtype=dtype,
            key=model_key,
        )

    return make


VOCAB_SIZE = 11

# Layers with mathematics of their own are checked in every size and dtype.
MIXERS: dict[str, Make] = {
    "conv": conv,
    "mamba1": mamba1,
    "mamba2": mamba2(ngroups=2, heads_per_group=3),
    "mamba2_options": mamba2(
        ngroups=1,
        heads_per_group=5,
        D_has_hdim=True,
        dt_limit=(0.3, 1.1),
        norm_before_gate=True,
        norm_eps=0.03,
        ssm_multipliers=(0.7, 1.3, 0.6, 1.7, 0.4),
        d_mlp=4,
    ),
    "mamba2_without_norm": mamba2(ngroups=3, heads_per_group=1, rms_norm=False),
    "attention": attention(nheads_kv=2, shared=3, d_conv=3),
    "attention_window": attention(
        nheads_kv=1, shared=4, window=True, rotary_emb_interleaved=True, softmax_scale=0.3
    ),
    "mamba3": mamba3(ngroups=1, heads_per_group=3),
    "mamba3_mimo": mamba3(
        ngroups=2,
        heads_per_group=2,
        mimo_rank=3,
        rope_fraction=1.0,
        A_activation="softplus",
        A_floor=0.5,
        outproj_norm=True,
        norm_eps=0.03,
    ),
    "gated_delta_net": gated_delta_net(ngroups=2, heads_per_group=3, norm_eps=0.03),
}

# As in Falcon-H1.
HEADS = stack(
    mbx.Parallel,
    mamba2(ngroups=1, heads_per_group=2, rms_norm=False, ssm_multipliers=(0.7, 1.3, 0.6, 1.7, 0.4)),
    attention(nheads_kv=1, shared=2),
    scales=(0.6, 1.4),
)

# Layers made of other layers, and small variations, are checked in one size.
COMPOSITES: dict[str, Make] = {
    "mamba1_normed": mamba1_normed("weighted"),
    "block": block(mamba1),
    "block_mlp": block(mamba1, mlp=gated_mlp),
    "block_mixture": block(
        mamba1,
        mlp=mixture(
            n_experts=6,
            top_k=3,
            routing="sigmoid",
            n_group=3,
            topk_group=2,
            scaling=1.7,
            gated=False,
            d_shared=2,
            d_latent=4,
        ),
    ),
    "block_mamba2": block(mamba2(ngroups=1, heads_per_group=2)),
    "block_mamba3": block(mamba3(ngroups=1, heads_per_group=2, mimo_rank=1)),
    "block_layernorm": block(mamba1, rms_norm=False),
    "unrolled": stack(mbx.Unrolled, block(mamba1), conv, mamba1_normed("weightless")),
    "unrolled_remat": stack(mbx.Unrolled, block(mamba1), block(mamba1, mlp=gated_mlp), remat=True),
    "parallel": HEADS,
    "stacked_parallel": stack(mbx.Stacked, *[block(HEADS, mlp=gated_mlp)] * 2, remat=True),
    "stacked": stack(mbx.Stacked, block(mamba1), block(mamba1), block(mamba1)),
    "stacked_attention": stack(mbx.Stacked, *[block(attention(nheads_kv=1, shared=2))] * 2),
    "stacked_remat": stack(
        mbx.Stacked, block(mamba1, mlp=gated_mlp), block(mamba1, mlp=gated_mlp), remat=True
    ),
    "stacked_mixtures": stack(
        mbx.Stacked, *[block(mamba1, mlp=mixture(n_experts=4, top_k=2))] * 2, remat=True
    ),
    "block_8_bits": quantized(block(mamba1), 8),
    "stacked_4_bits": quantized(stack(mbx.Stacked, *[block(mamba1)] * 2, remat=True), 4),
}

LANGUAGE_MODELS: dict[str, Make] = {
    "language_model": language_model(stack(mbx.Unrolled, block(mamba1), block(mamba1)), tie=True),
    "language_model_untied": language_model(
        stack(mbx.Stacked, block(mamba1), block(mamba1)), tie=False, residual_in_fp32=False
    ),
    "hybrid": language_model(
        stack(
            mbx.Unrolled,
            block(mamba2(ngroups=1, heads_per_group=2), mlp=gated_mlp),
            block(attention(nheads_kv=1, shared=2, d_conv=2), mlp=gated_mlp),
            remat=True,
        ),
        tie=True,
    ),
}

LAYERS = MIXERS | COMPOSITES

# The quick run (`pytest`) omits these layers, because similar layers cover most of their code.
VARIANTS = {
    "mamba1_normed",
    "mamba2_options",
    "mamba2_without_norm",
    "mamba3_mimo",
    "gated_delta_net",
    "attention_window",
    "block",
    "block_mlp",
    "block_mixture",
    "block_mamba2",
    "block_mamba3",
    "block_layernorm",
    "unrolled",
    "unrolled_remat",
    "parallel",
    "stacked_parallel",
    "stacked",
    "stacked_attention",
    "stacked_remat",
    "stacked_mixtures",
    "block_8_bits",
    "stacked_4_bits",
    "hybrid",
    "language_model_untied",
}
EVERYTHING = LAYERS | LANGUAGE_MODELS

# Laws that compile large programs are checked for these layers in a thorough run only. Their parts,
# and layers that are composed alike, have entries of their own.
SIMILAR = {
    "mamba2_without_norm",
    "block_mlp",
    "block_mamba2",
    "block_mamba3",
    "block_layernorm",
    "unrolled",
    "stacked_attention",
    "stacked_remat",
    "language_model_untied",
}


@functools.cache
def make_layer(name: str, s: Sizes, dtype: Any, seed: int) -> Any:
    """Makes a layer with random parameters.

    Many initial parameters are ones and zeros, which would hide mistakes.
    """
    make = EVERYTHING[name]
    rng = np.random.default_rng(seed)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-2, 3, leaf.shape), leaf.dtype)
        if leaf.dtype == jnp.uint8:  # Two integers of 4 bits, from -2 to 2.
            lower, upper = rng.integers(6, 11, (2, *leaf.shape))
            return jnp.asarray(lower | upper << 4, leaf.dtype)
        return jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(random, eqx.filter_eval_shape(lambda key: make(s, dtype, key), jr.key(0)))


def make_inputs(name: str, s: Sizes, seq: int, dtype: Any, seed: int) -> np.ndarray:
    """Makes a random sequence: token ids for language models, features for other layers."""
    rng = np.random.default_rng(seed)
    if name in LANGUAGE_MODELS:
        return rng.integers(0, VOCAB_SIZE, seq, np.int32)
    return rng.standard_normal((seq, s.d_model)).astype(jnp.dtype(dtype))
