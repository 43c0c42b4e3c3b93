import dataclasses
from typing import ClassVar

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import Attention, check_attention
from ._base import AbstractMixerConfig, check_flag, check_positive_number, check_size


@dataclasses.dataclass(frozen=True)
class AttentionConfig(AbstractMixerConfig):
    """The architecture of a [`mamba_eqx.Attention`][], whose arguments its fields are.

    Fields left out are set to the values they stand for, so that equal architectures are equal;
    so are the options of a rotary embedding of no features.
    """

    kind: ClassVar[str] = "attention"

    d_model: int
    nheads: int
    nheads_kv: int = None  # pyright: ignore[reportAssignmentType]  (set in `__post_init__`)
    headdim: int = None  # pyright: ignore[reportAssignmentType]
    d_conv: int = 0
    rotary_emb_dim: int = 0
    rotary_emb_base: float = 10000.0
    rotary_emb_interleaved: bool = False
    softmax_scale: float = None  # pyright: ignore[reportAssignmentType]
    window: int | None = None
    qkv_proj_bias: bool = False
    out_proj_bias: bool = False

    def __post_init__(self):
        for name in ("d_model", "nheads"):
            check_size(self, name)
        if self.nheads_kv is None:
            object.__setattr__(self, "nheads_kv", self.nheads)
        headdim = check_attention(
            self.d_model,
            self.nheads,
            self.nheads_kv,
            self.headdim,
            self.d_conv,
            self.rotary_emb_dim,
            self.window,
        )
        object.__setattr__(self, "headdim", headdim)
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", headdim**-0.5)
        for name in ("softmax_scale", "rotary_emb_base"):
            check_positive_number(self, name)
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("rotary_emb_interleaved", "qkv_proj_bias", "out_proj_bias"):
            check_flag(self, name)
        if self.rotary_emb_dim == 0:
            object.__setattr__(self, "rotary_emb_base", 10000.0)
            object.__setattr__(self, "rotary_emb_interleaved", False)

    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> Attention:
        """A new `Attention`, initialised as in the official code."""
        return Attention(
            self.d_model,
            nheads=self.nheads,
            nheads_kv=self.nheads_kv,
            headdim=self.headdim,
            d_conv=self.d_conv,
            rotary_emb_dim=self.rotary_emb_dim,
            rotary_emb_base=self.rotary_emb_base,
            rotary_emb_interleaved=self.rotary_emb_interleaved,
            softmax_scale=self.softmax_scale,
            window=self.window,
            qkv_proj_bias=self.qkv_proj_bias,
            out_proj_bias=self.out_proj_bias,
            residual_scale=residual_scale,
            dtype=dtype,
            key=key,
        )

    @classmethod
    def of(cls, mixer: Attention) -> "AttentionConfig":
        """The config of an existing `Attention`."""
        return cls(
            d_model=mixer.d_model,
            nheads=mixer.nheads,
            nheads_kv=mixer.nheads_kv,
            headdim=mixer.headdim,
            d_conv=0 if mixer.conv1d is None else mixer.conv1d.d_conv,
            rotary_emb_dim=mixer.rotary_emb_dim,
            rotary_emb_base=mixer.rotary_emb_base,
            rotary_emb_interleaved=mixer.rotary_emb_interleaved,
            softmax_scale=mixer.softmax_scale,
            window=mixer.window,
            qkv_proj_bias=mixer.in_proj.bias is not None,
            out_proj_bias=mixer.out_proj.bias is not None,
        )
