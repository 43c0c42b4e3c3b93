import dataclasses
from typing import ClassVar

from ..._checks import check_flag, check_positive, check_positive_number
from ...layers import GatedMLP
from .._config_fields import set_fields
from ._base import AbstractMLPConfig


@dataclasses.dataclass(frozen=True)
class GatedMLPConfig(AbstractMLPConfig[GatedMLP]):
    """The architecture of a [`mamba_eqx.GatedMLP`][]. The fields are arguments of `GatedMLP`.

    **Raises:** `ValueError` for every value that `GatedMLP` refuses.
    """

    kind: ClassVar[str] = "gated_mlp"
    mlp_type = GatedMLP

    d_intermediate: int
    bias: bool = False
    gate_multiplier: float = 1.0
    out_multiplier: float = 1.0

    def __post_init__(self):
        check_positive("d_intermediate", self.d_intermediate)
        check_flag("bias", self.bias)
        for name in ("gate_multiplier", "out_multiplier"):
            check_positive_number(name, getattr(self, name))
            set_fields(self, **{name: float(getattr(self, name))})

    @classmethod
    def of(cls, mlp: GatedMLP) -> "GatedMLPConfig":
        """See [`mamba_eqx.models.AbstractMLPConfig.of`][]."""
        return cls(
            mlp.d_intermediate,
            bias=mlp.fc1.bias is not None,
            gate_multiplier=mlp.gate_multiplier,
            out_multiplier=mlp.out_multiplier,
        )
