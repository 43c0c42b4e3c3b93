import dataclasses
from typing import ClassVar

from ...layers import MixtureOfExperts, Routing, check_mixture
from .._config_fields import set_fields
from ._base import AbstractMLPConfig


@dataclasses.dataclass(frozen=True)
class MixtureOfExpertsConfig(AbstractMLPConfig[MixtureOfExperts]):
    """The architecture of a [`mamba_eqx.MixtureOfExperts`][]. The fields are arguments of
    `MixtureOfExperts`.

    **Raises:** `ValueError` for every value that `MixtureOfExperts` refuses.
    """

    kind: ClassVar[str] = "mixture_of_experts"
    mlp_type = MixtureOfExperts

    d_intermediate: int
    n_experts: int
    top_k: int
    routing: Routing = "softmax_of_chosen"
    n_group: int = 1
    topk_group: int = 1
    renormalise: bool = True
    scaling: float = 1.0
    gated: bool = True
    d_shared: int | None = None
    d_latent: int | None = None

    def __post_init__(self):
        check_mixture(**vars(self))
        set_fields(self, scaling=float(self.scaling))

    @classmethod
    def of(cls, mlp: MixtureOfExperts) -> "MixtureOfExpertsConfig":
        """See [`mamba_eqx.models.AbstractMLPConfig.of`][]."""
        router, shared = mlp.router, mlp.shared
        return cls(
            mlp.d_intermediate,
            n_experts=router.n_experts,
            top_k=router.top_k,
            routing=router.routing,
            n_group=router.n_group,
            topk_group=router.topk_group,
            renormalise=router.renormalise,
            scaling=router.scaling,
            gated=mlp.gated,
            d_shared=None if shared is None else shared.d_intermediate,
            d_latent=mlp.d_latent,
        )
