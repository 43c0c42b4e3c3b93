import dataclasses

import equinox as eqx
import jax
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._checks import check_flag, check_fraction, check_positive_number
from ..layers import Block, Remat, Stacked, Unrolled
from ._block_config import BlockConfig
from ._config_fields import COMPUTED, set_fields
from ._config_json import fields_from_json, to_json
from ._language_model import LanguageModel, check_vocab_size
from ._round_trip import ARRAYS, checked_config


_MAX_MESSAGE = 1000


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The architecture of a [`mamba_eqx.LanguageModel`][].

    ```python
    block = mbx.BlockConfig(mbx.Mamba1Config(d_model=768))
    config = mbx.LanguageModelConfig(50277, (block,) * 24, padded_vocab_size=50280)
    model = config.build(key=jax.random.key(0))  # mamba-130m
    ```

    **Arguments:**

    - `vocab_size`: the number of token ids.
    - `layers`: a block config for each layer, first to last, all of the same `d_model`.
    - `padded_vocab_size`: the number of rows of the embedding; `vocab_size` by default.
    - `tie_embeddings`: whether the head is the transposed embedding.
    - `rms_norm`: whether the final norm is RMSNorm, rather than LayerNorm.
    - `norm_eps`: the epsilon of the final norm, a number between 0 and 1.
    - `residual_in_fp32`: whether the residual stream is at least float32, whatever the dtype of the
        parameters.
    - `embedding_multiplier`, `logits_multiplier`: positive numbers that multiply the embedded
        tokens and the logits.

    **Raises:** `ValueError` for every value that `LanguageModel` refuses.
    """

    vocab_size: int
    layers: tuple[BlockConfig, ...]
    padded_vocab_size: int = COMPUTED
    tie_embeddings: bool = True
    rms_norm: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0

    def __post_init__(self):
        padded_vocab_size = check_vocab_size(self.vocab_size, self.padded_vocab_size)
        set_fields(self, layers=tuple(self.layers), padded_vocab_size=padded_vocab_size)
        if not self.layers or not all(isinstance(layer, BlockConfig) for layer in self.layers):
            raise ValueError(
                f"`layers` must be one or more `BlockConfig`s, but got layers={self.layers!r}."
            )
        if len({layer.d_model for layer in self.layers}) > 1:
            raise ValueError(
                "`layers` must share `d_model`, but got d_model="
                f"{[layer.d_model for layer in self.layers]}."
            )
        check_flag("tie_embeddings", self.tie_embeddings)
        check_flag("rms_norm", self.rms_norm)
        check_flag("residual_in_fp32", self.residual_in_fp32)
        check_fraction("norm_eps", self.norm_eps)
        for name in ("embedding_multiplier", "logits_multiplier"):
            check_positive_number(name, getattr(self, name))
            set_fields(self, **{name: float(getattr(self, name))})

    @property
    def d_model(self) -> int:
        """The number of features of the residual stream."""
        return self.layers[0].d_model

    def build(
        self,
        *,
        stacked: bool = False,
        remat: Remat = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> LanguageModel:
        """Makes a new model, initialised as in the official code.

        **Arguments:**

        - `stacked`: whether the layers are [`mamba_eqx.Stacked`][] rather than
            [`mamba_eqx.Unrolled`][].
        - `remat`: whether to recompute intermediates in the reverse pass; see
            [`mamba_eqx.Unrolled`][].
        - `dtype`: the dtype of the parameters; float32 by default (float64 in JAX's 64-bit mode).
            Parameters of recurrences are at least float32.
        - `key`: the random key for the initial parameters.

        **Returns:**

        The model.
        """
        model_key, *layer_keys = jr.split(key, 1 + len(self.layers))
        # The official `_init_weights` counts one residual per layer, even if there is an MLP.
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
            embedding_multiplier=self.embedding_multiplier,
            logits_multiplier=self.logits_multiplier,
            dtype=dtype,
            key=model_key,
        )

    @classmethod
    def of(cls, model: LanguageModel) -> "LanguageModelConfig":
        """Reads the config of an existing model, whether its layers are `Unrolled` or `Stacked`.

        **Arguments:**

        - `model`: the model, or a pytree of its structure, with any arrays or
            `jax.ShapeDtypeStruct`s. Arrays may also be left out (`None`), except for biases: a
            missing bias is read as a layer without a bias.

        **Returns:**

        The config, which builds a model of the same structure and shapes. (How the layers are run,
        `stacked` and `remat`, is not part of the config.)

        **Raises:** `ValueError` if no config builds such a model.
        """
        shapes = jax.tree.map(
            lambda leaf: (
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, ARRAYS) else leaf
            ),
            model.layers,
        )
        layers = eqx.filter_eval_shape(lambda stack: stack.unstack(), shapes)
        for layer in layers:
            if not isinstance(layer, Block):
                raise ValueError(
                    f"There is no config for a layer of type {type(layer).__name__}, "
                    "only for Block."
                )
        config = cls(
            vocab_size=model.vocab_size,
            padded_vocab_size=model.padded_vocab_size,
            layers=tuple(BlockConfig.of(layer) for layer in layers),
            tie_embeddings=model.lm_head is None,
            rms_norm=isinstance(model.norm_f, eqx.nn.RMSNorm),
            norm_eps=model.norm_f.eps,
            residual_in_fp32=model.residual_in_fp32,
            embedding_multiplier=model.embedding_multiplier,
            logits_multiplier=model.logits_multiplier,
        )
        # `BlockConfig.of` has compared the layers.
        one_layer = dataclasses.replace(config, layers=config.layers[:1])
        checked_config(one_layer, model, ignore="layers")
        return config

    def to_json(self) -> str:
        """Converts the config to JSON, which `from_json` reads.

        **Returns:**

        A JSON object with a key for each field.
        """
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "LanguageModelConfig":
        """Reads a config that `to_json` wrote.

        **Arguments:**

        - `text`: a JSON object. Keys of fields with a default may be left out.

        **Returns:**

        The config.

        **Raises:** `ValueError` if `text` is not JSON, or a key is missing, unknown or invalid.
        """
        try:
            return cls(**fields_from_json(text, cls))
        except ValueError as error:
            message = str(error)
            if len(message) <= _MAX_MESSAGE:
                raise
            # Messages quote the value, which in a file can have any length.
            half = _MAX_MESSAGE // 2
            raise ValueError(f"{message[:half]} [...] {message[-half:]}") from None
