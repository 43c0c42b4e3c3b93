from typing import Any


# The default of a field whose default value depends on other fields. `__post_init__` replaces it,
# so that reading the field gives an `int` (or a `float`) and never `None`.
COMPUTED: Any = None


def set_fields(config: object, **values: object) -> None:
    """Sets fields of a frozen config, within its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(config, name, value)
