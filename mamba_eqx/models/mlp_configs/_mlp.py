import dataclasses
from typing import ClassVar

from ..._checks import check_flag, check_positive
from ...layers import MLP
from ._base import AbstractMLPConfig


@dataclasses.dataclass(frozen=True)
class MLPConfig(AbstractMLPConfig[MLP]):
    """The architecture of a [`mamba_eqx.MLP`][]. The fields are arguments of `MLP`.

    **Raises:** `ValueError` for every value that `MLP` refuses.
    """

    kind: ClassVar[str] = "mlp"
    mlp_type = MLP

    d_intermediate: int
    bias: bool = False

    def __post_init__(self):
        check_positive("d_intermediate", self.d_intermediate)
        check_flag("bias", self.bias)

    @classmethod
    def of(cls, mlp: MLP) -> "MLPConfig":
        """See [`mamba_eqx.models.AbstractMLPConfig.of`][]."""
        return cls(mlp.d_intermediate, bias=mlp.fc1.bias is not None)
