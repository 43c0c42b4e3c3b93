"""All layouts, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from ...formats import CheckpointError
from ...models import LanguageModelConfig
from ._layout import Layout
from ._mistral import MISTRAL
from ._state_spaces import STATE_SPACES
from .transformers import TRANSFORMERS


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {layout.name: layout for layout in (TRANSFORMERS, STATE_SPACES, MISTRAL)}
)


def check_storable(layout: Layout, config: LanguageModelConfig) -> None:
    """Checks that a layout can store a config, as `layout.check` does.

    **Raises:** `CheckpointError` if it cannot. The message names a layout that can, if any.
    """
    try:
        layout.check(config)
    except CheckpointError as error:
        name = next((name for name, other in LAYOUTS.items() if _stores(other, config)), None)
        remedy = "No layout can store this model." if name is None else f"Use `layout={name!r}`."
        raise CheckpointError(f"{error} {remedy}") from None


def _stores(layout: Layout, config: LanguageModelConfig) -> bool:
    try:
        layout.check(config)
    except CheckpointError:
        return False
    return True
