"""Choosing the next token from logits: filters, penalties and drawing."""

from ._draw import draw as draw
from ._filters import (
    check_min_p as check_min_p,
    check_temperature as check_temperature,
    check_top_k as check_top_k,
    check_top_p as check_top_p,
    check_typical_p as check_typical_p,
    filtered as filtered,
    greedy as greedy,
    min_p as min_p,
    sample as sample,
    temperature as temperature,
    top_k as top_k,
    top_p as top_p,
    typical_p as typical_p,
)
from ._penalties import (
    Penalties as Penalties,
    frequency_penalty as frequency_penalty,
    presence_penalty as presence_penalty,
    repetition_penalty as repetition_penalty,
)


# The public names. The others are for the other folders of the package.
__all__ = [
    "Penalties",
    "frequency_penalty",
    "greedy",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "sample",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
]
