"""Configs build modules and can be read off them; they never enter modules."""

import abc
import dataclasses
import json
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ._block import Block
from ._language_model import LanguageModel
from ._mlp import GatedMLP
from ._protocol import AbstractSequenceLayer
from ._stack import Stacked, Unrolled
from .mixers import Mamba1


class AbstractMixerConfig(abc.ABC):
    """What a mixer is made of. Subclasses are frozen dataclasses, one for each mixer."""

    kind: ClassVar[str]
    d_model: int

    @abc.abstractmethod
    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> AbstractSequenceLayer[Any]:
        """A new mixer of this kind, initialised as in the official code."""

    @classmethod
    @abc.abstractmethod
    def of(cls, mixer: Any) -> "AbstractMixerConfig":
        """The config of an existing mixer."""


@dataclasses.dataclass(frozen=True)
class Mamba1Config(AbstractMixerConfig):
    """The architecture of a [`mamba_eqx.Mamba1`][], whose arguments its fields are.

    Fields left out are set to the values they stand for, so that equal architectures are equal.
    """

    kind: ClassVar[str] = "mamba1"

    d_model: int
    d_inner: int = None  # pyright: ignore[reportAssignmentType]  (set in `__post_init__`)
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = None  # pyright: ignore[reportAssignmentType]
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self):
        _check_size(self, "d_model")
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", 2 * self.d_model)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        for name in ("d_inner", "d_state", "d_conv", "dt_rank"):
            _check_size(self, name)
        for name in ("bias", "conv_bias"):
            _check_flag(self, name)

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Mamba1:
        """A new `Mamba1`, initialised as in the official code."""
        return Mamba1(
            self.d_model,
            d_inner=self.d_inner,
            d_state=self.d_state,
            d_conv=self.d_conv,
            dt_rank=self.dt_rank,
            bias=self.bias,
            conv_bias=self.conv_bias,
            residual_scale=residual_scale,
            dtype=dtype,
            key=key,
        )

    @classmethod
    def of(cls, mixer: Mamba1) -> "Mamba1Config":
        """The config of an existing `Mamba1`."""
        return cls(
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            d_conv=mixer.conv1d.d_conv,
            dt_rank=mixer.dt_rank,
            bias=mixer.in_proj.bias is not None,
            conv_bias=mixer.conv1d.bias is not None,
        )


# One line for each mixer.
_CONFIG_OF: dict[type, type[AbstractMixerConfig]] = {Mamba1: Mamba1Config}
_CONFIG_NAMED = {config.kind: config for config in _CONFIG_OF.values()}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The architecture of a [`mamba_eqx.Block`][]; without `d_intermediate` it has no MLP."""

    mixer: AbstractMixerConfig
    d_intermediate: int | None = None
    rms_norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self):
        if not isinstance(self.mixer, AbstractMixerConfig):
            raise ValueError(
                f"`mixer` must be the config of a mixer, such as `Mamba1Config`, but got "
                f"{self.mixer!r}."
            )
        if self.d_intermediate is not None:
            _check_size(self, "d_intermediate")
        _check_flag(self, "rms_norm")
        _check_eps(self, "norm_eps")

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Block[Any]:
        """A new `Block`, initialised as in the official code."""
        mixer_key, mlp_key = jr.split(key)
        mlp = None
        if self.d_intermediate is not None:
            mlp = GatedMLP(
                self.mixer.d_model,
                self.d_intermediate,
                residual_scale=residual_scale,
                dtype=dtype,
                key=mlp_key,
            )
        mixer = self.mixer.build(residual_scale=residual_scale, dtype=dtype, key=mixer_key)
        return Block(mixer, mlp=mlp, rms_norm=self.rms_norm, norm_eps=self.norm_eps, dtype=dtype)

    @classmethod
    def of(cls, block: Block[Any]) -> "BlockConfig":
        """The config of an existing `Block`."""
        mixer_config = _CONFIG_OF.get(type(block.mixer))
        if mixer_config is None:
            raise ValueError(
                f"There is no config for a mixer of type {type(block.mixer).__name__}, only for "
                f"{', '.join(mixer.__name__ for mixer in _CONFIG_OF)}."
            )
        if block.mlp is not None and not isinstance(block.mlp, GatedMLP):
            raise ValueError(
                f"There is no config for an MLP of type {type(block.mlp).__name__}, only for "
                "GatedMLP."
            )
        return cls(
            mixer=mixer_config.of(block.mixer),
            d_intermediate=None if block.mlp is None else block.mlp.fc2.weight.shape[-1],
            rms_norm=isinstance(block.norm, eqx.nn.RMSNorm),
            norm_eps=block.norm.eps,
        )


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The architecture of a [`mamba_eqx.LanguageModel`][]: a block config for each layer.

    ```python
    block = mbx.BlockConfig(mbx.Mamba1Config(d_model=768))
    config = mbx.LanguageModelConfig(50277, (block,) * 24, padded_vocab_size=50280)
    model = config.build(key=jax.random.key(0))  # mamba-130m
    ```
    """

    vocab_size: int
    layers: tuple[BlockConfig, ...]
    padded_vocab_size: int = None  # pyright: ignore[reportAssignmentType]  (as above)
    tie_embeddings: bool = True
    rms_norm: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        _check_size(self, "vocab_size")
        if self.padded_vocab_size is None:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)
        _check_size(self, "padded_vocab_size")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                "`padded_vocab_size` must be at least `vocab_size`, but got "
                f"padded_vocab_size={self.padded_vocab_size} and vocab_size={self.vocab_size}."
            )
        if not self.layers or not all(isinstance(layer, BlockConfig) for layer in self.layers):
            raise ValueError(
                f"`layers` must be one or more `BlockConfig`s, but got {self.layers!r}."
            )
        if len({layer.mixer.d_model for layer in self.layers}) > 1:
            raise ValueError(
                "All layers must share `d_model`, but got "
                f"{[layer.mixer.d_model for layer in self.layers]}."
            )
        for name in ("tie_embeddings", "rms_norm", "residual_in_fp32"):
            _check_flag(self, name)
        _check_eps(self, "norm_eps")

    @property
    def d_model(self) -> int:
        return self.layers[0].mixer.d_model

    def build(
        self,
        *,
        stacked: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> LanguageModel:
        """A new model, initialised as in the official code.

        **Arguments:**

        - `stacked`: whether the layers go into a [`mamba_eqx.Stacked`][] instead of a
            [`mamba_eqx.Unrolled`][].
        - `remat`: see [`mamba_eqx.Unrolled`][].
        - `dtype`: of the parameters; float32 by default (float64 in JAX's 64-bit mode). Parameters
            of recurrences are at least float32.
        - `key`: for the initial parameters.
        """
        model_key, *layer_keys = jr.split(key, 1 + len(self.layers))
        # As the official `_init_weights`, with one residual per layer whether or not it has an MLP.
        residual_scale = len(self.layers) ** -0.5
        layers = [
            layer.build(residual_scale=residual_scale, dtype=dtype, key=layer_key)
            for layer, layer_key in zip(self.layers, layer_keys, strict=True)
        ]
        return LanguageModel(
            (Stacked if stacked else Unrolled)(layers, remat=remat),
            vocab_size=self.vocab_size,
            padded_vocab_size=self.padded_vocab_size,
            tie_embeddings=self.tie_embeddings,
            rms_norm=self.rms_norm,
            norm_eps=self.norm_eps,
            residual_in_fp32=self.residual_in_fp32,
            dtype=dtype,
            key=model_key,
        )

    @classmethod
    def of(cls, model: LanguageModel) -> "LanguageModelConfig":
        """The config of an existing model, whichever way its layers are run."""
        layers = jax.eval_shape(model.layers.unstack)
        for layer in layers:
            if not isinstance(layer, Block):
                raise ValueError(
                    f"There is no config for a layer of type {type(layer).__name__}, "
                    "only for Block."
                )
        return cls(
            vocab_size=model.vocab_size,
            padded_vocab_size=model.padded_vocab_size,
            layers=tuple(BlockConfig.of(layer) for layer in layers),
            tie_embeddings=model.lm_head is None,
            rms_norm=isinstance(model.norm_f, eqx.nn.RMSNorm),
            norm_eps=model.norm_f.eps,
            residual_in_fp32=model.residual_in_fp32,
        )

    def to_json(self) -> str:
        """The config as JSON; `from_json` is the inverse."""
        fields = dataclasses.asdict(self)
        for layer, config in zip(fields["layers"], self.layers, strict=True):
            layer["mixer"] = {"kind": config.mixer.kind} | layer["mixer"]
        return json.dumps(fields, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "LanguageModelConfig":
        """The config that `to_json` wrote.

        **Raises:** `ValueError` if `text` is not JSON, or a key is missing, unknown or absurd.
        """
        fields = _fields_of(json.loads(text), cls, "the config")
        layers = fields["layers"]
        if not isinstance(layers, list):
            raise ValueError(f"`layers` must be a list, but got {layers!r}.")
        fields["layers"] = tuple(map(_block_from_json, layers))
        return cls(**fields)


def _block_from_json(block: Any) -> BlockConfig:
    fields = _fields_of(block, BlockConfig, "an entry of `layers`")
    mixer = fields["mixer"]
    kind = mixer.get("kind") if isinstance(mixer, dict) else None
    if kind not in _CONFIG_NAMED:
        raise ValueError(
            f"The `kind` of a `mixer` must be one of {sorted(_CONFIG_NAMED)}, but got {mixer!r}."
        )
    mixer = {name: value for name, value in mixer.items() if name != "kind"}
    mixer_config = _CONFIG_NAMED[kind]
    fields["mixer"] = mixer_config(**_fields_of(mixer, mixer_config, f"a mixer of kind {kind!r}"))
    return BlockConfig(**fields)


def _fields_of(value: Any, config: type, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"Expected a JSON object for {what}, but got {value!r}.")
    fields = dataclasses.fields(config)
    unknown = value.keys() - {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = required - value.keys()
    if unknown or missing:
        raise ValueError(
            f"The keys of {what} do not fit {config.__name__}: "
            f"unknown {sorted(unknown)}, missing {sorted(missing)}."
        )
    return dict(value)


def _check_size(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be an integer of at least 1, "
            f"but got {value!r}."
        )


def _check_flag(config: Any, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be true or false, but got {value!r}."
        )


def _check_eps(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < 1:
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be between 0 and 1, but got {value!r}."
        )
