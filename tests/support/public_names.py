"""The public names of the package."""

import types
from collections.abc import Iterable
from typing import Any

import mamba_eqx as mbx


def public_objects() -> dict[str, Any]:
    """Returns everything public, by its full name."""
    found = names_in("mamba_eqx", mbx, dir(mbx))
    found |= names_in("mamba_eqx.training", mbx.training, vars(mbx.training))
    for space in (
        "generation",
        "inspection",
        "layers",
        "models",
        "ops",
        "sampling",
        "sharding",
        "testing",
        "text",
    ):
        part = getattr(mbx, space)
        names = sorted(set(part.__all__) - set(dir(mbx)))  # All processes need the same order.
        found |= names_in(f"mamba_eqx.{space}", part, names)
    return found


def names_in(prefix: str, module: types.ModuleType, names: Iterable[str]) -> dict[str, Any]:
    """Returns the named attributes of a module, without private names and submodules."""
    values = {f"{prefix}.{n}": getattr(module, n) for n in names if not n.startswith("_")}
    return {name: v for name, v in values.items() if not isinstance(v, types.ModuleType)}
