"""Configs build modules and can be read off them; they never enter modules."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ..layers import Block, GatedMLP, Stacked, Unrolled
from ._language_model import LanguageModel
from .mixer_configs import (
    CONFIG_NAMED,
    CONFIG_OF,
    AbstractMixerConfig,
    check_eps,
    check_flag,
    check_size,
)


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
            check_size(self, "d_intermediate")
        check_flag(self, "rms_norm")
        check_eps(self, "norm_eps")

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
        mixer_config = CONFIG_OF.get(type(block.mixer))
        if mixer_config is None:
            raise ValueError(
                f"There is no config for a mixer of type {type(block.mixer).__name__}, only for "
                f"{', '.join(mixer.__name__ for mixer in CONFIG_OF)}."
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
        check_size(self, "vocab_size")
        if self.padded_vocab_size is None:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)
        check_size(self, "padded_vocab_size")
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
            check_flag(self, name)
        check_eps(self, "norm_eps")

    @property
    def d_model(self) -> int:
        return self.layers[0].mixer.d_model

    def build(
        self,
        *,
        stacked: bool = False,
        remat: bool | Callable[..., Any] = False,
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
        return json.dumps(_to_json(fields), indent=2, allow_nan=False)

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


_INFINITY = "Infinity"  # JSON has no number for it.


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    return _INFINITY if value == math.inf else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    return math.inf if value == _INFINITY else value


def _block_from_json(block: Any) -> BlockConfig:
    fields = _fields_of(block, BlockConfig, "an entry of `layers`")
    mixer = fields["mixer"]
    kind = mixer.get("kind") if isinstance(mixer, dict) else None
    if kind not in CONFIG_NAMED:
        raise ValueError(
            f"The `kind` of a `mixer` must be one of {sorted(CONFIG_NAMED)}, but got {mixer!r}."
        )
    mixer = {name: _from_json(value) for name, value in mixer.items() if name != "kind"}
    mixer_config = CONFIG_NAMED[kind]
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
