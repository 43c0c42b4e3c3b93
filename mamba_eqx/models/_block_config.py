import dataclasses
from typing import Any

import equinox as eqx
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray, PyTree

from .._checks import check_flag, check_fraction, check_positive
from ..layers import Block, GatedMLP
from .mixer_configs import MIXER_CONFIGS, AbstractMixerConfig, checked_config


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The architecture of a [`mamba_eqx.Block`][].

    **Arguments:**

    - `mixer`: the config of the mixer.
    - `d_intermediate`: the hidden width of a [`mamba_eqx.GatedMLP`][]; `None` for a block without
        an MLP.
    - `rms_norm`: whether the norms are RMSNorm, rather than LayerNorm.
    - `norm_eps`: the epsilon of the norms, a number between 0 and 1.
    - `mlp_bias`: whether the MLP has biases; must be `False` for a block without an MLP.

    **Raises:** `ValueError` for every value that `Block` or `GatedMLP` refuses, and for `mlp_bias`
    without an MLP.
    """

    mixer: AbstractMixerConfig[Any]
    d_intermediate: int | None = None
    rms_norm: bool = True
    norm_eps: float = 1e-5
    mlp_bias: bool = False

    def __post_init__(self):
        if not isinstance(self.mixer, AbstractMixerConfig):
            raise ValueError(
                "`mixer` must be the config of a mixer, such as `Mamba1Config`, but got "
                f"mixer={self.mixer!r}."
            )
        if self.d_intermediate is not None:
            check_positive("d_intermediate", self.d_intermediate)
        check_flag("rms_norm", self.rms_norm)
        check_fraction("norm_eps", self.norm_eps)
        check_flag("mlp_bias", self.mlp_bias)
        if self.mlp_bias and self.d_intermediate is None:
            raise ValueError(
                "`mlp_bias=True` needs an MLP, but got d_intermediate=None. Set `d_intermediate`."
            )

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
        if self.d_intermediate is not None:
            mlp = GatedMLP(
                self.mixer.d_model,
                self.d_intermediate,
                bias=self.mlp_bias,
                residual_scale=residual_scale,
                dtype=dtype,
                key=mlp_key,
            )
        mixer = self.mixer.build(residual_scale=residual_scale, dtype=dtype, key=mixer_key)
        return Block(mixer, mlp=mlp, rms_norm=self.rms_norm, norm_eps=self.norm_eps, dtype=dtype)

    @classmethod
    def of(cls, block: Block[PyTree]) -> "BlockConfig":
        """Reads the config of an existing `Block`.

        **Arguments:**

        - `block`: the block, or a pytree of its structure, with any arrays or
            `jax.ShapeDtypeStruct`s. Arrays may also be left out (`None`), except for biases and for
            `mlp.fc2.weight`, from which fields are read.

        **Returns:**

        The config, which builds a block of the same structure and shapes.

        **Raises:** `ValueError` if no config builds such a block.
        """
        mlp = block.mlp
        if mlp is not None and not isinstance(mlp, GatedMLP):
            raise ValueError(
                f"There is no config for an MLP of type {type(mlp).__name__}, only for GatedMLP."
            )
        config = cls(
            mixer=_mixer_config(block.mixer),
            d_intermediate=None if mlp is None else mlp.fc2.weight.shape[-1],
            rms_norm=isinstance(block.norm, eqx.nn.RMSNorm),
            norm_eps=block.norm.eps,
            mlp_bias=mlp is not None and mlp.fc1.bias is not None,
        )
        return checked_config(config, block)


def _mixer_config(mixer: PyTree) -> AbstractMixerConfig[Any]:
    config = MIXER_CONFIGS.get(type(mixer))
    if config is None:
        raise ValueError(
            f"There is no config for a mixer of type {type(mixer).__name__}, only for "
            f"{', '.join(known.__name__ for known in MIXER_CONFIGS)}."
        )
    return config.of(mixer)
