"""The MLPs of transformers' model type `granitemoehybrid`: a gated MLP, which is also the shared
expert of a mixture of experts."""

from dataclasses import replace
from types import MappingProxyType

from ....models import MixtureOfExpertsConfig
from .._layout import AnyArray, Slot, Transform
from .._mixers import gated_mlp
from .._tables import Table, fixed, size
from ._family import Part
from ._hybrid import SHARED_EXPERT


def _swap_halves(weight: AnyArray, /) -> AnyArray:
    # The rows are the last axis but one. The weight of experts has another axis in front.
    *experts, rows, d_model = weight.shape
    halves = weight.reshape(*experts, 2, rows // 2, d_model)
    return halves[..., ::-1, :, :].reshape(weight.shape)


# The value precedes the gate in the model, and the gate the value in the file.
_GATE_FIRST = Transform(_swap_halves, _swap_halves)


def _name_mlp(config: object) -> list[Slot]:
    del config
    return [
        Slot("shared_mlp.input_linear.weight", "fc1.weight", _GATE_FIRST),
        Slot("shared_mlp.output_linear.weight", "fc2.weight"),
    ]


def _name_experts(config: object) -> list[Slot]:
    return [
        Slot("block_sparse_moe.router.layer.weight", "router.weight"),
        Slot("block_sparse_moe.input_linear.weight", "fc1", _GATE_FIRST),
        Slot("block_sparse_moe.output_linear.weight", "fc2"),
        *(replace(slot, path=f"shared.{slot.path}") for slot in _name_mlp(config)),
    ]


# The names in transformers 5, which saves models under the names above unless told otherwise.
IN_MEMORY = MappingProxyType(
    {
        "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
        "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    }
)


MLP = Part(
    gated_mlp(size("shared_intermediate_size", "d_intermediate", 1024)),
    _name_mlp,
    unused=(),
)
EXPERTS = Part(
    Table(
        MixtureOfExpertsConfig,
        (
            size("intermediate_size", "d_intermediate", 11008),
            size("shared_intermediate_size", "d_shared", 1024),
            size("num_local_experts", "n_experts", 8),
            size("num_experts_per_tok", "top_k", 2),
            fixed("routing", "softmax_of_chosen", "experts with another routing than Granite's"),
            fixed("gated", True, "experts without a gate"),
            fixed("d_latent", None, "experts in a smaller space"),
            SHARED_EXPERT,
        ),
    ),
    _name_experts,
    absent={"num_local_experts": 0},
    unused=("intermediate_size", "num_local_experts", "num_experts_per_tok"),
)
