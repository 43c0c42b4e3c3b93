"""The names of parameters in checkpoints: a function for each mixer, shared by all layouts."""

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
from ._layout import IDENTITY, AnyArray, Slot, Transform


def _conv_to_file(weight: AnyArray, /) -> AnyArray:
    # A weight with more axes, such as one made by `vmap`, would be transposed wrongly.
    if weight.ndim != 2:
        raise CheckpointError(
            f"The weight of `conv1d` must be of shape (d_conv, d_inner), but is {weight.shape}. "
            "Take one model out of an ensemble first."
        )
    return weight.T[:, None, :]


def _conv_from_file(weight: AnyArray, /) -> AnyArray:
    return weight[:, 0, :].T


# (d_conv, d_inner) in the model, (d_inner, 1, d_conv) in torch's `Conv1d`.
_CONV_WEIGHT = Transform(_conv_to_file, _conv_from_file)


def _per_head(headdim: int) -> Transform:
    """Returns the transform of `D`: (nheads, headdim) in the model, (d_inner,) in the file."""

    def to_file(D: AnyArray, /) -> AnyArray:
        if D.ndim != 2:
            raise CheckpointError(
                f"`D` must be of shape (nheads, headdim), but is {D.shape}. "
                "Take one model out of an ensemble first."
            )
        return D.reshape(-1)

    def from_file(D: AnyArray, /) -> AnyArray:
        return D.reshape(-1, headdim)

    return Transform(to_file, from_file)


def same(*names: str) -> list[Slot]:
    """Returns slots of tensors whose names are the paths of their leaves."""
    return [Slot(name, name) for name in names]


def within(slots: list[Slot], name: str, path: str) -> list[Slot]:
    """Returns the slots of a module with the given name in the file and path in the model."""
    return [slot.within(name, path) for slot in slots]


def mamba1(config: Mamba1Config) -> list[Slot]:
    """Returns the slots of a Mamba-1 mixer: upstream's names, except for the bias of `dt_proj`."""
    return [
        *same("in_proj.weight"),
        Slot("conv1d.weight", "conv1d.weight", _CONV_WEIGHT),
        *same("x_proj.weight", "dt_proj.weight"),
        Slot("dt_proj.bias", "dt_bias"),
        *same("A_log", "D", "out_proj.weight"),
        *(same("conv1d.bias") if config.conv_bias else ()),
        *(same("in_proj.bias", "out_proj.bias") if config.bias else ()),
    ]


def mamba2(config: Mamba2Config) -> list[Slot]:
    """Returns the slots of a Mamba-2 mixer: upstream's names."""
    return [
        *same("in_proj.weight"),
        Slot("conv1d.weight", "conv1d.weight", _CONV_WEIGHT),
        *same("dt_bias", "A_log"),
        Slot("D", "D", _per_head(config.headdim) if config.D_has_hdim else IDENTITY),
        *same("out_proj.weight"),
        *(same("conv1d.bias") if config.conv_bias else ()),
        *(same("norm.weight") if config.rms_norm else ()),
        *(same("in_proj.bias", "out_proj.bias") if config.bias else ()),
    ]


def mamba3(config: Mamba3Config) -> list[Slot]:
    """Returns the slots of a Mamba-3 mixer: upstream's names."""
    return [
        *same("in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight"),
        *same("D", "out_proj.weight"),
        *(same("mimo_x", "mimo_z", "mimo_o") if config.mimo_rank is not None else ()),
        *(same("norm.weight") if config.outproj_norm else ()),
    ]


def attention(config: AttentionConfig) -> list[Slot]:
    """Returns the slots of an attention mixer: upstream's names."""
    slots = same("in_proj.weight", "out_proj.weight")
    if config.d_conv > 0:
        slots += [Slot("conv1d.weight", "conv1d.weight", _CONV_WEIGHT), *same("conv1d.bias")]
    if config.qkv_proj_bias:
        slots += same("in_proj.bias")
    if config.out_proj_bias:
        slots += same("out_proj.bias")
    return slots


# The function that returns the slots, for each kind of mixer.
_MIXERS: MappingProxyType[type[AbstractMixerConfig[Any]], Callable[..., list[Slot]]] = (
    MappingProxyType(
        {
            Mamba1Config: mamba1,
            Mamba2Config: mamba2,
            Mamba3Config: mamba3,
            AttentionConfig: attention,
        }
    )
)


def mixer(config: AbstractMixerConfig[Any]) -> list[Slot]:
    """Returns the slots of a mixer."""
    return _MIXERS[type(config)](config)


def norm(name: str, path: str, *, rms_norm: bool) -> list[Slot]:
    """Returns the slots of a norm; an RMSNorm has no bias."""
    return within(same("weight") if rms_norm else same("weight", "bias"), name, path)


def layer(i: int) -> str:
    """Returns the path of a layer in a model with `Unrolled` layers."""
    return f"layers.layers.{i}"


def language_model(config: LanguageModelConfig, *, embedding: str) -> list[Slot]:
    """Returns the slots of a model under the names of the official repository.

    **Arguments:**

    - `config`: the config of the model.
    - `embedding`: the name of the embedding's weight, in which the layouts differ.
    """
    slots = [Slot(embedding, "embedding.weight")]
    for i, block in enumerate(config.layers):
        slots += within(_block(block), f"backbone.layers.{i}", layer(i))
    slots += norm("backbone.norm_f", "norm_f", rms_norm=config.rms_norm)
    return slots if config.tie_embeddings else [*slots, *same("lm_head.weight")]


def _block(config: BlockConfig) -> list[Slot]:
    slots = norm("norm", "norm", rms_norm=config.rms_norm)
    slots += within(mixer(config.mixer), "mixer", "mixer")
    if config.mlp is not None:
        slots += norm("norm2", "norm2", rms_norm=config.rms_norm)
        slots += same("mlp.fc1.weight", "mlp.fc2.weight")
    return slots
