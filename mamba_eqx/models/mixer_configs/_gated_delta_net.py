import dataclasses
from typing import ClassVar

from ...layers import GatedDeltaNet, check_gated_delta_net
from .._config_fields import COMPUTED, set_fields
from .._round_trip import checked_config
from ._base import AbstractMixerConfig


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(AbstractMixerConfig[GatedDeltaNet]):
    """The architecture of a [`mamba_eqx.GatedDeltaNet`][].

    The fields are the arguments of `GatedDeltaNet`. Defaults are computed when the config is made,
    so that configs of equal architectures are equal.

    **Raises:** `ValueError` for every value that `GatedDeltaNet` refuses.
    """

    kind: ClassVar[str] = "gated_delta_net"
    mixer_type = GatedDeltaNet

    d_model: int
    d_inner: int = COMPUTED
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 128
    ngroups: int = COMPUTED
    norm_eps: float = 1e-6

    def __post_init__(self):
        d_inner, ngroups = check_gated_delta_net(**vars(self))
        set_fields(self, d_inner=d_inner, ngroups=ngroups)

    @classmethod
    def of(cls, mixer: GatedDeltaNet) -> "GatedDeltaNetConfig":
        """See [`mamba_eqx.models.AbstractMixerConfig.of`][]."""
        config = cls(
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            d_conv=mixer.conv1d.d_conv,
            headdim=mixer.headdim,
            ngroups=mixer.ngroups,
            norm_eps=mixer.norm.eps,
        )
        return checked_config(config, mixer)
