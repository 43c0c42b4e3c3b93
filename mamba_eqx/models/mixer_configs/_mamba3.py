import dataclasses
from typing import ClassVar, Literal

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import Mamba3, check_A, check_heads, check_rope_fraction
from ._base import AbstractMixerConfig, check_eps, check_flag, check_number, check_size


@dataclasses.dataclass(frozen=True)
class Mamba3Config(AbstractMixerConfig):
    """The architecture of a [`mamba_eqx.Mamba3`][], whose arguments its fields are.

    `d_inner`, if left out, is set to the value it stands for, so that equal architectures are
    equal.
    """

    kind: ClassVar[str] = "mamba3"

    d_model: int
    d_inner: int = None  # pyright: ignore[reportAssignmentType]  (set in `__post_init__`)
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
        check_size(self, "d_model")
        if self.d_inner is None:
            object.__setattr__(self, "d_inner", 2 * self.d_model)
        for name in ("d_inner", "d_state", "headdim", "ngroups"):
            check_size(self, name)
        check_heads(self.d_inner, self.headdim, self.ngroups)
        if self.mimo_rank is not None:
            check_size(self, "mimo_rank")
        for name in ("rope_fraction", "A_floor"):
            check_number(self, name)
            object.__setattr__(self, name, float(getattr(self, name)))
        check_rope_fraction(self.rope_fraction, self.d_state)
        check_A(self.A_activation, self.A_floor)
        check_flag(self, "outproj_norm")
        check_eps(self, "norm_eps")

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Mamba3:
        """A new `Mamba3`, initialised as in the official code."""
        return Mamba3(
            self.d_model,
            d_inner=self.d_inner,
            d_state=self.d_state,
            headdim=self.headdim,
            ngroups=self.ngroups,
            mimo_rank=self.mimo_rank,
            rope_fraction=self.rope_fraction,
            A_activation=self.A_activation,
            A_floor=self.A_floor,
            outproj_norm=self.outproj_norm,
            norm_eps=self.norm_eps,
            residual_scale=residual_scale,
            dtype=dtype,
            key=key,
        )

    @classmethod
    def of(cls, mixer: Mamba3) -> "Mamba3Config":
        """The config of an existing `Mamba3`."""
        return cls(
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
