import dataclasses
import math
from typing import ClassVar, Literal

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import Mamba1, check_select_norm
from ._base import AbstractMixerConfig, check_eps, check_flag, check_size


_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Mamba1Config(AbstractMixerConfig):
    """The architecture of a [`mamba_eqx.Mamba1`][], whose arguments its fields are.

    Fields left out are set to the values they stand for, so that equal architectures are equal;
    so is `select_norm_eps` where there is no such norm.
    """

    kind: ClassVar[str] = "mamba1"

    d_model: int
    d_inner: int = None  # pyright: ignore[reportAssignmentType]  (set in `__post_init__`)
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = None  # pyright: ignore[reportAssignmentType]
    bias: bool = False
    conv_bias: bool = True
    select_norm: Literal["weighted", "weightless"] | None = None
    select_norm_eps: float = _EPS

    def __post_init__(self):
        check_size(self, "d_model")
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", 2 * self.d_model)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        for name in ("d_inner", "d_state", "d_conv", "dt_rank"):
            check_size(self, name)
        for name in ("bias", "conv_bias"):
            check_flag(self, name)
        check_eps(self, "select_norm_eps")
        check_select_norm(self.select_norm, self.select_norm_eps)
        if self.select_norm is None:
            object.__setattr__(self, "select_norm_eps", _EPS)

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Mamba1:
        """A new `Mamba1`, initialised as in the official code."""
        return Mamba1(
            self.d_model,
            d_inner=self.d_inner,
            d_state=self.d_state,
            d_conv=self.d_conv,
            dt_rank=self.dt_rank,
            bias=self.bias,
            conv_bias=self.conv_bias,
            select_norm=self.select_norm,
            select_norm_eps=self.select_norm_eps,
            residual_scale=residual_scale,
            dtype=dtype,
            key=key,
        )

    @classmethod
    def of(cls, mixer: Mamba1) -> "Mamba1Config":
        """The config of an existing `Mamba1`."""
        norm = mixer.dt_norm
        return cls(
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
