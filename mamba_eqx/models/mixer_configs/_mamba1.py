import dataclasses
from typing import ClassVar, Literal

from ...layers import Mamba1, check_mamba1
from .._config_fields import COMPUTED, set_fields
from .._round_trip import checked_config
from ._base import AbstractMixerConfig


_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Mamba1Config(AbstractMixerConfig[Mamba1]):
    """The architecture of a [`mamba_eqx.Mamba1`][].

    The fields are the arguments of `Mamba1`. Defaults are computed when the config is made, so that
    configs of equal architectures are equal; `select_norm_eps` is set to its default if
    `select_norm` is `None`.

    **Raises:** `ValueError` for every value that `Mamba1` refuses.
    """

    kind: ClassVar[str] = "mamba1"
    mixer_type = Mamba1

    d_model: int
    d_inner: int = COMPUTED
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = COMPUTED
    bias: bool = False
    conv_bias: bool = True
    select_norm: Literal["weighted", "weightless"] | None = None
    select_norm_eps: float = _EPS

    def __post_init__(self):
        d_inner, dt_rank = check_mamba1(**vars(self))
        set_fields(self, d_inner=d_inner, dt_rank=dt_rank)
        if self.select_norm is None:
            set_fields(self, select_norm_eps=_EPS)

    @classmethod
    def of(cls, mixer: Mamba1) -> "Mamba1Config":
        """See [`mamba_eqx.models.AbstractMixerConfig.of`][]."""
        norm = mixer.dt_norm
        config = cls(
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            d_conv=mixer.conv1d.d_conv,
            dt_rank=mixer.dt_rank,
            bias=mixer.in_proj.bias is not None,
            conv_bias=mixer.conv1d.bias is not None,
            select_norm=(None if norm is None else "weighted" if norm.use_weight else "weightless"),
            select_norm_eps=_EPS if norm is None else norm.eps,
        )
        return checked_config(config, mixer)
