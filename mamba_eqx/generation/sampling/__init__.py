"""Choosing the next token from logits: filters, penalties and drawing."""

from ._checks import (
    LARGEST as LARGEST,
    PerRow as PerRow,
    PerRowInt as PerRowInt,
    check_each as check_each,
    check_min_p as check_min_p,
    check_temperature_or_greedy as check_temperature_or_greedy,
    check_top_k_or_all as check_top_k_or_all,
    check_top_p as check_top_p,
    check_typical_p as check_typical_p,
    read_number as read_number,
    shorten as shorten,
)
from ._draw import draw as draw
from ._filters import (
    min_p as min_p,
    temperature as temperature,
    top_k as top_k,
    top_p as top_p,
    typical_p as typical_p,
)
from ._penalties import (
    Penalties as Penalties,
    frequency_penalty as frequency_penalty,
    penalise as penalise,
    presence_penalty as presence_penalty,
    repetition_penalty as repetition_penalty,
)
from ._sample import (
    Filters as Filters,
    filtered as filtered,
    greedy as greedy,
    sample as sample,
    sample_filtered as sample_filtered,
)
from ._threshold import keep_only as keep_only


# The public names. Other folders of the package may import the other names too.
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
