"""What the configs of all mixers share."""

import abc
import math
from typing import Any, ClassVar

from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ...layers import AbstractSequenceLayer


class AbstractMixerConfig(abc.ABC):
    """What a mixer is made of. Subclasses are frozen dataclasses, one for each mixer."""

    kind: ClassVar[str]
    d_model: int

    @abc.abstractmethod
    def build(
        self, *, residual_scale: float = 1.0, dtype: DTypeLike | None = None, key: PRNGKeyArray
    ) -> AbstractSequenceLayer[Any]:
        """A new mixer of this kind, initialised as in the official code."""

    @classmethod
    @abc.abstractmethod
    def of(cls, mixer: Any) -> "AbstractMixerConfig":
        """The config of an existing mixer."""


def check_size(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be an integer of at least 1, "
            f"but got {value!r}."
        )


def check_number(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be a number, but got {value!r}."
        )


def check_flag(config: Any, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be true or false, but got {value!r}."
        )


def check_eps(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < 1:
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be between 0 and 1, but got {value!r}."
        )


def check_positive_number(config: Any, name: str) -> None:
    check_number(config, name)
    value = getattr(config, name)
    if not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` of {type(config).__name__} must be a number above 0, but got {value!r}."
        )
