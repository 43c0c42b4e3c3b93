import dataclasses
from typing import ClassVar

from ...layers import Attention, check_attention
from .._config_fields import COMPUTED, set_fields
from .._round_trip import checked_config
from ._base import AbstractMixerConfig


_ROTARY_EMB_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class AttentionConfig(AbstractMixerConfig[Attention]):
    """The architecture of an [`mamba_eqx.Attention`][].

    The fields are the arguments of `Attention`. Defaults are computed when the config is made, so
    that configs of equal architectures are equal; the options of the rotary embedding are set to
    their defaults if `rotary_emb_dim` is 0.

    **Raises:** `ValueError` for every value that `Attention` refuses.
    """

    kind: ClassVar[str] = "attention"
    mixer_type = Attention

    d_model: int
    nheads: int
    nheads_kv: int = COMPUTED
    headdim: int = COMPUTED
    d_conv: int = 0
    rotary_emb_dim: int = 0
    rotary_emb_base: float = _ROTARY_EMB_BASE
    rotary_emb_interleaved: bool = False
    softmax_scale: float = COMPUTED
    window: int | None = None
    qkv_proj_bias: bool = False
    out_proj_bias: bool = False

    def __post_init__(self):
        nheads_kv, headdim, softmax_scale = check_attention(**vars(self))
        set_fields(self, nheads_kv=nheads_kv, headdim=headdim, softmax_scale=softmax_scale)
        set_fields(self, rotary_emb_base=float(self.rotary_emb_base))
        if self.rotary_emb_dim == 0:
            set_fields(self, rotary_emb_base=_ROTARY_EMB_BASE, rotary_emb_interleaved=False)

    @classmethod
    def of(cls, mixer: Attention) -> "AttentionConfig":
        """See [`mamba_eqx.models.AbstractMixerConfig.of`][]."""
        config = cls(
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
        return checked_config(config, mixer)
