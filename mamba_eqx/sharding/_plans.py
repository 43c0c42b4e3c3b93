"""How the arrays of each layer are cut for tensor parallelism.

A device has some of the heads or channels of a layer, and everything that all heads share.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..layers import MLP, Attention, GatedMLP, Mamba1, Mamba2, Mamba3


class Part(NamedTuple):
    """A part of an axis: `size` entries, of which each device has its share, or all of them."""

    size: int
    is_cut: bool = True


Parts = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a layer is cut. Paths are those of the layer's fields, and axes count from the end.

    **Arguments:**

    - `outputs`: the linear maps that emit channels, and the parts of their outputs.
    - `sums`: the linear maps that sum over channels.
    - `arrays`: the axis of the channels of other arrays, and its parts. Arrays that are not named
        apply to what all devices compute alike.
    - `sizes`: the sizes of the layer on one device.
    - `state`: the axis of the channels in the fields of the state, and its parts.
    - `spreads_norm`: whether `norm` takes its mean over the channels of all devices.
    """

    outputs: Mapping[str, Parts]
    sums: tuple[str, ...]
    arrays: Mapping[str, tuple[int, Parts]] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    state: Mapping[str, tuple[int, Parts]] = dataclasses.field(default_factory=dict)
    spreads_norm: bool = False


def plan(layer: object, devices: int) -> Plan:
    """Returns how a layer is cut over a number of devices.

    **Raises:** `ValueError` if the number of devices does not divide a size of the layer.
    """
    return PLANS[type(layer)](layer, devices)


def _share(layer: object, name: str, size: int, devices: int) -> int:
    if size % devices:
        raise ValueError(
            f"The size of the mesh axis 'tensor' must divide `{name}` of `{type(layer).__name__}`, "
            f"but got {devices} devices and {name}={size}. Use a mesh whose axis 'tensor' divides "
            "it."
        )
    return size // devices


def _groups(layer: object, name: str, groups: int, devices: int) -> tuple[bool, int]:
    """Returns whether groups of heads are cut, and how many a device has."""
    if groups == 1:
        return False, 1
    return True, _share(layer, name, groups, devices)


def _mamba1(layer: Mamba1, devices: int) -> Plan:
    inner = (Part(layer.d_inner),)
    share = _share(layer, "d_inner", layer.d_inner, devices)
    return Plan(
        outputs={"in_proj": inner * 2, "dt_proj": inner},
        sums=("x_proj", "out_proj"),
        arrays={
            "conv1d.weight": (-1, inner),
            "conv1d.bias": (-1, inner),
            "dt_bias": (-1, inner),
            "A_log": (-2, inner),
            "D": (-1, inner),
        },
        sizes={"d_inner": share, "conv1d.d_model": share},
        state={"conv": (-1, inner), "ssm": (-1, inner)},
    )


def _mamba2(layer: Mamba2, devices: int) -> Plan:
    if layer.d_ssm < layer.d_inner:
        raise ValueError(
            "`Mamba2` must have no channels of an MLP to be cut over devices, but has "
            f"d_ssm={layer.d_ssm} and d_inner={layer.d_inner}. Use a mesh without an axis 'tensor'."
        )
    share = _share(layer, "nheads", layer.nheads, devices) * layer.headdim
    is_cut, ngroups = _groups(layer, "ngroups", layer.ngroups, devices)
    inner, heads = (Part(layer.d_ssm),), (Part(layer.nheads),)
    B = C = Part(layer.ngroups * layer.d_state, is_cut)
    channels = (*inner, B, C)
    skip = -2 if layer.D_has_hdim else -1
    return Plan(
        outputs={"in_proj": (*inner, *channels, *heads)},
        sums=("out_proj",),
        arrays={
            "conv1d.weight": (-1, channels),
            "conv1d.bias": (-1, channels),
            "dt_bias": (-1, heads),
            "A_log": (-1, heads),
            "D": (skip, heads),
            "norm.weight": (-1, inner),
        },
        sizes={
            "d_inner": share,
            "d_ssm": share,
            "ngroups": ngroups,
            "norm.ngroups": ngroups,
            "conv1d.d_model": share + 2 * ngroups * layer.d_state,
        },
        state={"conv": (-1, channels), "ssm": (-2, heads)},
        spreads_norm=not is_cut,
    )


def _mamba3(layer: Mamba3, devices: int) -> Plan:
    nheads = _share(layer, "nheads", layer.nheads, devices)
    is_cut, ngroups = _groups(layer, "ngroups", layer.ngroups, devices)
    inner, heads = (Part(layer.d_inner),), (Part(layer.nheads),)
    # `B` and `C` are ordered by rank, then by group.
    B = C = (Part(layer.ngroups * layer.d_state, is_cut),) * layer.rank
    shared = (Part(layer.d_state, False),)
    per_head = dict.fromkeys(("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"), (-3, heads))
    return Plan(
        outputs={"in_proj": (*inner * 2, *B, *C, *heads * 3, Part(layer.pairs, False))},
        sums=("out_proj",),
        arrays={
            "dt_bias": (-1, heads),
            "D": (-1, heads),
            "norm.weight": (-1, inner),
            "B_norm.weight": (-1, shared),
            "C_norm.weight": (-1, shared),
            **per_head,
        },
        sizes={"d_inner": nheads * layer.headdim, "ngroups": ngroups, "norm.ngroups": nheads},
        state={"angle": (-2, heads), "ssm": (-3, heads), "k": (-2, heads), "v": (-2, heads)},
    )


def _attention(layer: Attention, devices: int) -> Plan:
    nheads = _share(layer, "nheads", layer.nheads, devices)
    is_cut, nheads_kv = _groups(layer, "nheads_kv", layer.nheads_kv, devices)
    q, kv = Part(layer.nheads * layer.headdim), Part(layer.nheads_kv * layer.headdim, is_cut)
    channels, cache = (q, kv, kv), (Part(layer.nheads_kv, is_cut),)
    return Plan(
        outputs={"in_proj": channels},
        sums=("out_proj",),
        arrays={"conv1d.weight": (-1, channels), "conv1d.bias": (-1, channels)},
        sizes={
            "nheads": nheads,
            "nheads_kv": nheads_kv,
            "conv1d.d_model": (nheads + 2 * nheads_kv) * layer.headdim,
        },
        state={"conv": (-1, channels), "k": (-3, cache), "v": (-3, cache)},
    )


def _gated_mlp(layer: GatedMLP, devices: int) -> Plan:
    width = (Part(layer.d_intermediate),)
    share = _share(layer, "d_intermediate", layer.d_intermediate, devices)
    return Plan({"fc1": width * 2}, ("fc2",), sizes={"d_intermediate": share})


def _mlp(layer: MLP, devices: int) -> Plan:
    width = (Part(layer.d_intermediate),)
    share = _share(layer, "d_intermediate", layer.d_intermediate, devices)
    return Plan({"fc1": width}, ("fc2",), sizes={"d_intermediate": share})


PLANS: dict[type, Callable[[Any, int], Plan]] = {
    Mamba1: _mamba1,
    Mamba2: _mamba2,
    Mamba3: _mamba3,
    Attention: _attention,
    GatedMLP: _gated_mlp,
    MLP: _mlp,
}
"""The layers that can be cut."""
