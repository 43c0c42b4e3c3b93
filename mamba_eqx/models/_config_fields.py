from collections.abc import Mapping
from typing import Any, TypeVar

from jaxtyping import PyTree


_Config = TypeVar("_Config")

# The default of a field whose default value depends on other fields. `__post_init__` replaces it,
# so that reading the field gives an `int` (or a `float`) and never `None`.
COMPUTED: Any = None


def set_fields(config: object, **values: object) -> None:
    """Sets fields of a frozen config, within its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def config_class(classes: Mapping[type, _Config], module: PyTree, what: str) -> _Config:
    """Returns the class of configs of `module`, of the kind `what`.

    **Raises:** `ValueError` if `classes` has none.
    """
    config = classes.get(type(module))
    if config is None:
        raise ValueError(
            f"There is no config for {what} of type {type(module).__name__}, only for "
            f"{', '.join(known.__name__ for known in classes)}."
        )
    return config
