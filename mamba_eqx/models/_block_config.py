import dataclasses
from typing import Any

import equinox as eqx
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import check_flag, check_fraction, check_positive_number
from ..layers import Block
from ._config_fields import config_class, set_fields
from ._round_trip import checked_config
from .mixer_configs import MIXER_CONFIGS, AbstractMixerConfig
from .mlp_configs import MLP_CONFIGS, AbstractMLPConfig


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The architecture of a [`mamba_eqx.Block`][].

    **Arguments:**

    - `mixer`: the config of the mixer.
    - `mlp`: the config of the MLP, such as [`mamba_eqx.GatedMLPConfig`][]; `None` for a block
        without an MLP.
    - `residual_multiplier`: a positive number that multiplies the outputs of the mixer and of the
        MLP.
    - `rms_norm`: whether the norms are RMSNorm, rather than LayerNorm.
    - `norm_eps`: the epsilon of the norms, a number between 0 and 1.

    **Raises:** `ValueError` for every value that `Block` refuses.
    """

    mixer: AbstractMixerConfig[Any]
    mlp: AbstractMLPConfig[Any] | None = None
    residual_multiplier: float = 1.0
    rms_norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self):
        if not isinstance(self.mixer, AbstractMixerConfig):
            raise ValueError(
                "`mixer` must be the config of a mixer, such as `Mamba1Config`, but got "
                f"mixer={self.mixer!r}."
            )
        if self.mlp is not None and not isinstance(self.mlp, AbstractMLPConfig):
            raise ValueError(
                "`mlp` must be the config of an MLP, such as `GatedMLPConfig`, or None, but got "
                f"mlp={self.mlp!r}."
            )
        check_positive_number("residual_multiplier", self.residual_multiplier)
        set_fields(self, residual_multiplier=float(self.residual_multiplier))
        check_flag("rms_norm", self.rms_norm)
        check_fraction("norm_eps", self.norm_eps)

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.mixer.d_model

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Block[PyTree]:
        """Makes a new `Block`, initialised as in the official code.

        **Arguments:**

        - `residual_scale`, `dtype`, `key`: the arguments of the mixer of the same names; see
            [`mamba_eqx.Mamba1`][]. They apply to the MLP as well.

        **Returns:**

        The block.
        """
        mixer_key, mlp_key = jr.split(key)
        mlp = None
        if self.mlp is not None:
            mlp = self.mlp.build(
                self.d_model, residual_scale=residual_scale, dtype=dtype, key=mlp_key
            )
        mixer = self.mixer.build(residual_scale=residual_scale, dtype=dtype, key=mixer_key)
        return Block(
            mixer,
            mlp=mlp,
            residual_multiplier=self.residual_multiplier,
            rms_norm=self.rms_norm,
            norm_eps=self.norm_eps,
            dtype=dtype,
        )

    @classmethod
    def of(cls, block: Block[PyTree]) -> "BlockConfig":
        """Reads the config of an existing `Block`.

        **Arguments:**

        - `block`: the block, or a pytree of its structure, with any arrays or
            `jax.ShapeDtypeStruct`s. Arrays may also be left out (`None`), except for biases: a
            missing bias is read as a layer without a bias.

        **Returns:**

        The config, which builds a block of the same structure and shapes.

        **Raises:** `ValueError` if no config builds such a block.
        """
        mixer, mlp = block.mixer, block.mlp
        config = cls(
            mixer=config_class(MIXER_CONFIGS, mixer, "a mixer").of(mixer),
            mlp=None if mlp is None else config_class(MLP_CONFIGS, mlp, "an MLP").of(mlp),
            residual_multiplier=block.residual_multiplier,
            rms_norm=isinstance(block.norm, eqx.nn.RMSNorm),
            norm_eps=block.norm.eps,
        )
        return checked_config(config, block)
