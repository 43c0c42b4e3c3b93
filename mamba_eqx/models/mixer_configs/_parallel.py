import dataclasses
from typing import Any, ClassVar

import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import (
    Attention,
    GatedDeltaNet,
    Mamba1,
    Mamba2,
    Mamba3,
    Parallel,
    check_parallel,
)
from .._config_fields import COMPUTED, config_class, set_fields
from .._round_trip import checked_config
from ._attention import AttentionConfig
from ._base import AbstractMixerConfig
from ._gated_delta_net import GatedDeltaNetConfig
from ._mamba1 import Mamba1Config
from ._mamba2 import Mamba2Config
from ._mamba3 import Mamba3Config


@dataclasses.dataclass(frozen=True)
class ParallelConfig(AbstractMixerConfig[Parallel]):
    """The architecture of a [`mamba_eqx.Parallel`][].

    **Arguments:**

    - `mixers`: the configs of the layers, which are mixers.
    - `scales`: a positive number for each mixer, which multiplies its output; 1 by default.

    **Raises:** `ValueError` for every value that `Parallel` refuses.
    """

    kind: ClassVar[str] = "parallel"
    mixer_type = Parallel

    mixers: tuple[AbstractMixerConfig[Any], ...]
    scales: tuple[float, ...] = COMPUTED

    def __post_init__(self):
        if not isinstance(self.mixers, tuple) or not all(
            isinstance(mixer, AbstractMixerConfig) for mixer in self.mixers
        ):
            raise ValueError(
                "`mixers` must be a tuple of configs of mixers, such as `Mamba2Config`, but got "
                f"mixers={self.mixers!r}."
            )
        widths = [mixer.d_model for mixer in self.mixers]
        set_fields(self, scales=check_parallel("mixers", widths, self.scales))

    @property
    def d_model(self) -> int:
        """The number of features of a token."""
        return self.mixers[0].d_model

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Parallel:
        """See [`mamba_eqx.models.AbstractMixerConfig.build`][]."""
        keys = jr.split(key, len(self.mixers))
        layers = [
            mixer.build(residual_scale=residual_scale, dtype=dtype, key=mixer_key)
            for mixer, mixer_key in zip(self.mixers, keys, strict=True)
        ]
        return Parallel(layers, scales=self.scales)

    @classmethod
    def of(cls, mixer: Parallel) -> "ParallelConfig":
        """See [`mamba_eqx.models.AbstractMixerConfig.of`][]."""
        classes = [config_class(MIXER_CONFIGS, layer, "a mixer") for layer in mixer.layers]
        mixers = tuple(c.of(layer) for c, layer in zip(classes, mixer.layers, strict=True))
        return checked_config(cls(mixers, scales=mixer.scales), mixer)


# One entry for each mixer, in the file of `ParallelConfig` because that may contain any of them.
MIXER_CONFIGS: dict[type, type[AbstractMixerConfig[Any]]] = {
    Mamba1: Mamba1Config,
    Mamba2: Mamba2Config,
    Mamba3: Mamba3Config,
    GatedDeltaNet: GatedDeltaNetConfig,
    Attention: AttentionConfig,
    Parallel: ParallelConfig,
}
