import dataclasses
import math
from typing import Any, ClassVar

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import Mamba2, check_d_ssm, check_dt_limit, check_heads
from ._base import AbstractMixerConfig, check_eps, check_flag, check_size


@dataclasses.dataclass(frozen=True)
class Mamba2Config(AbstractMixerConfig):
    """The architecture of a [`mamba_eqx.Mamba2`][], whose arguments its fields are.

    Fields left out are set to the values they stand for, so that equal architectures are equal;
    so is `norm_eps` where there is no norm.
    """

    kind: ClassVar[str] = "mamba2"

    d_model: int
    d_inner: int = None  # pyright: ignore[reportAssignmentType]  (set in `__post_init__`)
    d_ssm: int = None  # pyright: ignore[reportAssignmentType]
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
    norm_eps: float = 1e-5

    def __post_init__(self):
        check_size(self, "d_model")
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", 2 * self.d_model)
        if self.d_ssm is None:
            object.__setattr__(self, "d_ssm", self.d_inner)
        for name in ("d_inner", "d_ssm", "d_state", "d_conv", "headdim", "ngroups"):
            check_size(self, name)
        check_d_ssm(self.d_ssm, self.d_inner)
        name = "d_inner" if self.d_ssm == self.d_inner else "d_ssm"
        check_heads(self.d_ssm, self.headdim, self.ngroups, name=name)
        for name in ("D_has_hdim", "bias", "conv_bias", "rms_norm", "norm_before_gate"):
            check_flag(self, name)
        check_eps(self, "norm_eps")
        if not self.rms_norm:
            object.__setattr__(self, "norm_eps", 1e-5)
            if self.norm_before_gate:
                raise ValueError(
                    "`norm_before_gate` of Mamba2Config needs the norm, but got rms_norm=False."
                )
        object.__setattr__(self, "dt_limit", _as_limit(self.dt_limit))

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Mamba2:
        """A new `Mamba2`, initialised as in the official code."""
        return Mamba2(
            self.d_model,
            d_inner=self.d_inner,
            d_ssm=self.d_ssm,
            d_state=self.d_state,
            d_conv=self.d_conv,
            headdim=self.headdim,
            ngroups=self.ngroups,
            D_has_hdim=self.D_has_hdim,
            dt_limit=self.dt_limit,
            bias=self.bias,
            conv_bias=self.conv_bias,
            rms_norm=self.rms_norm,
            norm_before_gate=self.norm_before_gate,
            norm_eps=self.norm_eps,
            residual_scale=residual_scale,
            dtype=dtype,
            key=key,
        )

    @classmethod
    def of(cls, mixer: Mamba2) -> "Mamba2Config":
        """The config of an existing `Mamba2`."""
        norm = mixer.norm
        return cls(
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
            norm_eps=1e-5 if norm is None else norm.eps,
        )


def _as_limit(value: Any) -> tuple[float, float]:
    if not (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(v, float | int) and not isinstance(v, bool) for v in value)
    ):
        raise ValueError(
            f"`dt_limit` of Mamba2Config must be a tuple of two numbers, but got {value!r}."
        )
    check_dt_limit(value)
    return float(value[0]), float(value[1])
