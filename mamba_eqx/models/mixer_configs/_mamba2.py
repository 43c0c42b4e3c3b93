import dataclasses
import math
from typing import ClassVar

from ...layers import Mamba2, check_mamba2
from .._config_fields import COMPUTED, set_fields
from .._round_trip import checked_config
from ._base import AbstractMixerConfig


_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Mamba2Config(AbstractMixerConfig[Mamba2]):
    """The architecture of a [`mamba_eqx.Mamba2`][].

    The fields are the arguments of `Mamba2`. Defaults are computed when the config is made, so that
    configs of equal architectures are equal; `norm_eps` is set to its default if there is no norm.

    **Raises:** `ValueError` for every value that `Mamba2` refuses.
    """

    kind: ClassVar[str] = "mamba2"
    mixer_type = Mamba2

    d_model: int
    d_inner: int = COMPUTED
    d_ssm: int = COMPUTED
    d_state: int = 128
    d_conv: int = 4
    headdim: int = 64
    ngroups: int = 1
    D_has_hdim: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    rms_norm: bool = True
    norm_before_gate: bool = False
    norm_eps: float = _EPS
    ssm_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)

    def __post_init__(self):
        d_inner, d_ssm = check_mamba2(**vars(self))
        low, high = self.dt_limit
        set_fields(self, d_inner=d_inner, d_ssm=d_ssm, dt_limit=(float(low), float(high)))
        set_fields(self, ssm_multipliers=tuple(map(float, self.ssm_multipliers)))
        if not self.rms_norm:
            set_fields(self, norm_eps=_EPS)

    @classmethod
    def of(cls, mixer: Mamba2) -> "Mamba2Config":
        """See [`mamba_eqx.models.AbstractMixerConfig.of`][]."""
        norm = mixer.norm
        config = cls(
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_ssm=mixer.d_ssm,
            d_state=mixer.d_state,
            d_conv=mixer.conv1d.d_conv,
            headdim=mixer.headdim,
            ngroups=mixer.ngroups,
            D_has_hdim=mixer.D_has_hdim,
            dt_limit=mixer.dt_limit,
            bias=mixer.in_proj.bias is not None,
            conv_bias=mixer.conv1d.bias is not None,
            rms_norm=norm is not None,
            norm_before_gate=norm is not None and norm.norm_before_gate,
            norm_eps=_EPS if norm is None else norm.eps,
            ssm_multipliers=mixer.ssm_multipliers,
        )
        return checked_config(config, mixer)
