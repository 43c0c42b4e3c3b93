"""The laws of sequence layers, for layers of your own."""

from ._check_laws import (
    LAWS as LAWS,
    LawError as LawError,
    check_laws as check_laws,
)


__all__ = ["LAWS", "LawError", "check_laws"]
