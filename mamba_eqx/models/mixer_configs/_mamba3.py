import dataclasses
from typing import ClassVar, Literal

from ...layers import Mamba3, check_mamba3
from .._config_fields import COMPUTED, set_fields
from .._round_trip import checked_config
from ._base import AbstractMixerConfig


@dataclasses.dataclass(frozen=True)
class Mamba3Config(AbstractMixerConfig[Mamba3]):
    """The architecture of a [`mamba_eqx.Mamba3`][].

    The fields are the arguments of `Mamba3`. Defaults are computed when the config is made, so that
    configs of equal architectures are equal.

    **Raises:** `ValueError` for every value that `Mamba3` refuses.
    """

    kind: ClassVar[str] = "mamba3"
    mixer_type = Mamba3

    d_model: int
    d_inner: int = COMPUTED
    d_state: int = 128
    headdim: int = 64
    ngroups: int = 1
    mimo_rank: int | None = None
    rope_fraction: float = 0.5
    A_activation: Literal["heavy_tail", "softplus"] = "heavy_tail"
    A_floor: float = 1e-4
    outproj_norm: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self):
        set_fields(self, d_inner=check_mamba3(**vars(self)))
        set_fields(self, rope_fraction=float(self.rope_fraction), A_floor=float(self.A_floor))

    @classmethod
    def of(cls, mixer: Mamba3) -> "Mamba3Config":
        """See [`mamba_eqx.models.AbstractMixerConfig.of`][]."""
        config = cls(
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            headdim=mixer.headdim,
            ngroups=mixer.ngroups,
            mimo_rank=mixer.mimo_rank,
            rope_fraction=mixer.rope_fraction,
            A_activation=mixer.A_activation,
            A_floor=mixer.A_floor,
            outproj_norm=mixer.norm is not None,
            norm_eps=mixer.B_norm.eps,
        )
        return checked_config(config, mixer)
