"""The experts of Nemotron 3: chosen by a sigmoid, without gates, beside a shared expert."""

from ....models import MixtureOfExpertsConfig, MLPConfig
from .._layout import Slot
from .._names import within
from .._tables import (
    JSON,
    Arguments,
    Row,
    RowInput,
    Table,
    constant,
    fixed,
    flag,
    number,
    size,
)
from ._family import Part
from ._hybrid import SHARED_EXPERT, named_experts
from ._hybrid_names import experts, mlp


# The fields of experts, which configs of models without experts have as well.
_FIELDS = frozenset(
    """
    mlp_bias moe_intermediate_size moe_latent_size moe_shared_expert_intermediate_size n_group
    n_routed_experts n_shared_experts norm_topk_prob num_experts_per_tok routed_scaling_factor
    topk_group
    """.split()  # noqa: SIM905
)


def _read_latent(given: RowInput) -> Arguments:
    key = "moe_latent_size"
    return {"d_latent": None if given.fields.get(key, None) is None else given.fields.size(key)}


def _write_latent(config: MixtureOfExpertsConfig) -> JSON:
    return {} if config.d_latent is None else {"moe_latent_size": config.d_latent}


def _mixture(config: MixtureOfExpertsConfig) -> list[Slot]:
    one = [Slot("up_proj.weight", "fc1"), Slot("down_proj.weight", "fc2")]
    slots = [
        Slot("gate.weight", "router.weight"),
        Slot("gate.e_score_correction_bias", "router.correction_bias"),
        *experts(one, config.n_experts),
    ]
    if config.d_shared is not None:
        slots += within(mlp(MLPConfig(config.d_shared)), "shared_experts", "shared")
    if config.d_latent is not None:
        slots += [
            Slot(f"{name}_latent_proj.weight", f"{name}_latent.weight") for name in ("fc1", "fc2")
        ]
    return slots


EXPERTS = Part(
    Table(
        MixtureOfExpertsConfig,
        (
            named_experts("n_routed_experts", 8),
            size("num_experts_per_tok", "top_k", 2),
            size("moe_intermediate_size", "d_intermediate", 7688),
            size("moe_shared_expert_intermediate_size", "d_shared", 7688),
            SHARED_EXPERT,
            constant("n_shared_experts", 1, written=True),
            Row(_read_latent, _write_latent),
            fixed("routing", "sigmoid", "experts of Nemotron-H with another routing"),
            size("n_group", "n_group", 1),
            size("topk_group", "topk_group", 1),
            flag("norm_topk_prob", "renormalise", True),
            number("routed_scaling_factor", "scaling", 1.0),
            fixed("gated", False, "gated experts of Nemotron-H"),
            constant("mlp_bias", False, written=True),
        ),
    ),
    _mixture,
    "mixer",
    unused=_FIELDS,
)
