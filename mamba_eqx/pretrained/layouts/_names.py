"""The names that parameters have in checkpoints: one table for each mixer, used by all layouts."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from ...formats import CheckpointError
from ...models import (
    AbstractMixerConfig,
    AttentionConfig,
    BlockConfig,
    LanguageModelConfig,
    Mamba1Config,
    Mamba2Config,
    Mamba3Config,
)
from ._layout import IDENTITY, Entry, Transform


def _conv_to_file(weight: Any) -> Any:
    # Anything else, from a `vmap` say, would be transposed to nonsense.
    if weight.ndim != 2:
        raise CheckpointError(
            f"The weight of `conv1d` must be of shape (d_conv, d_inner), but is {weight.shape}. "
            "Take one model out of an ensemble first."
        )
    return weight.T[:, None, :]


# (d_conv, d_inner) here, (d_inner, 1, d_conv) in torch's `Conv1d`.
_CONV_WEIGHT = Transform(_conv_to_file, from_file=lambda weight: weight[:, 0, :].T)


def mamba1(config: Mamba1Config) -> list[Entry]:
    """The names within a Mamba-1 mixer: upstream's own, but for the bias of `dt_proj`."""
    entries = [
        Entry("in_proj.weight", lambda mixer: mixer.in_proj.weight),
        Entry("conv1d.weight", lambda mixer: mixer.conv1d.weight, _CONV_WEIGHT),
        Entry("x_proj.weight", lambda mixer: mixer.x_proj.weight),
        Entry("dt_proj.weight", lambda mixer: mixer.dt_proj.weight),
        Entry("dt_proj.bias", lambda mixer: mixer.dt_bias),
        Entry("A_log", lambda mixer: mixer.A_log),
        Entry("D", lambda mixer: mixer.D),
        Entry("out_proj.weight", lambda mixer: mixer.out_proj.weight),
    ]
    if config.conv_bias:
        entries.append(Entry("conv1d.bias", lambda mixer: mixer.conv1d.bias))
    if config.bias:
        entries.append(Entry("in_proj.bias", lambda mixer: mixer.in_proj.bias))
        entries.append(Entry("out_proj.bias", lambda mixer: mixer.out_proj.bias))
    return entries


def mamba2(config: Mamba2Config) -> list[Entry]:
    """The names within a Mamba-2 mixer: upstream's own."""
    entries = [
        Entry("in_proj.weight", lambda mixer: mixer.in_proj.weight),
        Entry("conv1d.weight", lambda mixer: mixer.conv1d.weight, _CONV_WEIGHT),
        Entry("dt_bias", lambda mixer: mixer.dt_bias),
        Entry("A_log", lambda mixer: mixer.A_log),
        Entry("D", lambda mixer: mixer.D, _by_head(config) if config.D_has_hdim else IDENTITY),
        Entry("out_proj.weight", lambda mixer: mixer.out_proj.weight),
    ]
    if config.conv_bias:
        entries.append(Entry("conv1d.bias", lambda mixer: mixer.conv1d.bias))
    if config.rms_norm:
        entries.append(Entry("norm.weight", lambda mixer: mixer.norm.weight))
    if config.bias:
        entries.append(Entry("in_proj.bias", lambda mixer: mixer.in_proj.bias))
        entries.append(Entry("out_proj.bias", lambda mixer: mixer.out_proj.bias))
    return entries


def mamba3(config: Mamba3Config) -> list[Entry]:
    """The names within a Mamba-3 mixer: upstream's own."""
    entries = [
        Entry("in_proj.weight", lambda mixer: mixer.in_proj.weight),
        Entry("dt_bias", lambda mixer: mixer.dt_bias),
        Entry("B_bias", lambda mixer: mixer.B_bias),
        Entry("C_bias", lambda mixer: mixer.C_bias),
        Entry("B_norm.weight", lambda mixer: mixer.B_norm.weight),
        Entry("C_norm.weight", lambda mixer: mixer.C_norm.weight),
        Entry("D", lambda mixer: mixer.D),
        Entry("out_proj.weight", lambda mixer: mixer.out_proj.weight),
    ]
    if config.mimo_rank is not None:
        entries.append(Entry("mimo_x", lambda mixer: mixer.mimo_x))
        entries.append(Entry("mimo_z", lambda mixer: mixer.mimo_z))
        entries.append(Entry("mimo_o", lambda mixer: mixer.mimo_o))
    if config.outproj_norm:
        entries.append(Entry("norm.weight", lambda mixer: mixer.norm.weight))
    return entries


def _by_head(config: Mamba2Config) -> Transform:
    """(nheads, headdim) here, (d_inner,) in the file."""

    def to_file(D: Any) -> Any:
        if D.ndim != 2:
            raise CheckpointError(
                f"`D` must be of shape (nheads, headdim), but is {D.shape}. "
                "Take one model out of an ensemble first."
            )
        return D.reshape(-1)

    return Transform(to_file, from_file=lambda D: D.reshape(-1, config.headdim))


def attention(config: AttentionConfig) -> list[Entry]:
    """The names within an attention mixer: upstream's own."""
    entries = [
        Entry("in_proj.weight", lambda mixer: mixer.in_proj.weight),
        Entry("out_proj.weight", lambda mixer: mixer.out_proj.weight),
    ]
    if config.d_conv > 0:
        entries.append(Entry("conv1d.weight", lambda mixer: mixer.conv1d.weight, _CONV_WEIGHT))
        entries.append(Entry("conv1d.bias", lambda mixer: mixer.conv1d.bias))
    if config.qkv_proj_bias:
        entries.append(Entry("in_proj.bias", lambda mixer: mixer.in_proj.bias))
    if config.out_proj_bias:
        entries.append(Entry("out_proj.bias", lambda mixer: mixer.out_proj.bias))
    return entries


# One line for each mixer.
_MIXERS: MappingProxyType[type[AbstractMixerConfig], Callable[[Any], list[Entry]]]
_MIXERS = MappingProxyType(
    {Mamba1Config: mamba1, Mamba2Config: mamba2, Mamba3Config: mamba3, AttentionConfig: attention}
)


def mixer(config: AbstractMixerConfig) -> list[Entry]:
    """The names within a mixer."""
    return _MIXERS[type(config)](config)


def block(config: BlockConfig) -> list[Entry]:
    """The names within a block."""
    entries = norm("norm", lambda block: block.norm, config.rms_norm)
    entries += [entry.within("mixer", lambda block: block.mixer) for entry in mixer(config.mixer)]
    if config.d_intermediate is not None:
        entries += norm("norm2", lambda block: block.norm2, config.rms_norm)
        entries.append(Entry("mlp.fc1.weight", lambda block: block.mlp.fc1.weight))
        entries.append(Entry("mlp.fc2.weight", lambda block: block.mlp.fc2.weight))
    return entries


def norm(name: str, where: Callable[[Any], Any], rms_norm: bool) -> list[Entry]:
    """The names within a norm; an RMSNorm has no bias."""
    weight = Entry("weight", lambda norm: norm.weight).within(name, where)
    bias = Entry("bias", lambda norm: norm.bias).within(name, where)
    return [weight] if rms_norm else [weight, bias]


def language_model(config: LanguageModelConfig, *, embedding: str) -> list[Entry]:
    """The names in a whole model.

    **Arguments:**

    - `embedding`: the name of the embedding, on which the layouts differ.
    """
    entries = [Entry(embedding, lambda model: model.embedding.weight)]
    for i, layer in enumerate(config.layers):
        where = layer_of(i)
        entries += [entry.within(f"backbone.layers.{i}", where) for entry in block(layer)]
    entries += norm("backbone.norm_f", lambda model: model.norm_f, config.rms_norm)
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", lambda model: model.lm_head.weight))
    return entries


def layer_of(i: int) -> Callable[[Any], Any]:
    return lambda model: model.layers.layers[i]
