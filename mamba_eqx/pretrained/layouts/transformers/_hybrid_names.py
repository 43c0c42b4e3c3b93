"""The names of parameters in transformers' hybrid models, most of them the names of Llama's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ....models import AttentionConfig, GatedMLPConfig, MLPConfig
from .._layout import Slot
from ._family import Names


LLAMA_NAMES = Names(embedding="model.embed_tokens.weight", norm_f="model.final_layernorm")


def attention(config: AttentionConfig) -> list[Slot]:
    """Returns the slots of attention, with one tensor each for queries, keys and values."""
    kv_rows = config.nheads_kv * config.headdim
    qkv = {"q_proj": config.nheads * config.headdim, "k_proj": kv_rows, "v_proj": kv_rows}
    slots = split(qkv, "weight", "in_proj.weight")
    slots.append(Slot("o_proj.weight", "out_proj.weight"))
    if config.qkv_proj_bias:
        slots += split(qkv, "bias", "in_proj.bias")
    if config.out_proj_bias:
        slots.append(Slot("o_proj.bias", "out_proj.bias"))
    return slots


def gated_mlp(config: GatedMLPConfig) -> list[Slot]:
    """Returns the slots of a gated MLP, with one tensor each for value and gate."""
    fc1 = {"up_proj": config.d_intermediate, "gate_proj": config.d_intermediate}
    slots = [*split(fc1, "weight", "fc1.weight"), Slot("down_proj.weight", "fc2.weight")]
    if config.bias:
        slots += [*split(fc1, "bias", "fc1.bias"), Slot("down_proj.bias", "fc2.bias")]
    return slots


def mlp(config: MLPConfig) -> list[Slot]:
    """Returns the slots of an MLP without a gate."""
    return [
        Slot(f"{name}.{kind}", f"{path}.{kind}")
        for kind in ("weight", "bias")[: 1 + config.bias]
        for name, path in {"up_proj": "fc1", "down_proj": "fc2"}.items()
    ]


def split(sizes: Mapping[str, int], ending: str, path: str) -> list[Slot]:
    """Returns the slots of a leaf whose rows are divided among several modules of the file.

    **Arguments:**

    - `sizes`: the number of rows of each module, in order.
    - `ending`: the name of the tensor in each module.
    - `path`: the path of the leaf.
    """
    slots: list[Slot] = []
    end = 0
    for name, size in sizes.items():
        slots.append(Slot(f"{name}.{ending}", path, rows=(end, end + size)))
        end += size
    return slots


def experts(slots: Sequence[Slot], n_experts: int) -> list[Slot]:
    """Returns the slots of leaves of experts, each of which has modules of its own in the file.

    **Arguments:**

    - `slots`: the slots of one expert.
    - `n_experts`: the number of experts.
    """
    return [
        replace(slot, name=f"experts.{e}.{slot.name}", expert=e)
        for e in range(n_experts)
        for slot in slots
    ]
