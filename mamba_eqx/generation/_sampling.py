"""The options of a generation as users write them."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float

from ..text import Tokenizer
from ._prompts import check_token_ids
from .sampling import (
    Penalties,
    PerRow,
    PerRowInt,
    check_min_p,
    check_temperature,
    check_top_k,
    check_top_p,
    check_typical_p,
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How [`mamba_eqx.generate`][] and its relatives choose tokens, and which texts end a row.

    The defaults decode greedily up to `max_new_tokens`. An instance depends on no model and can be
    used any number of times; `dataclasses.replace(sampling, temperature=0.5)` makes a variant.

    Options are applied in this order: `penalties`, `logit_bias`, `temperature`, `top_k`, `top_p`,
    `min_p`, `typical_p`. Greedy decoding depends on the first two only.

    Options marked *per row* are one number, or a sequence or array with one number for each row of
    a batch. Turning an option on or off recompiles the decoding loop, and so does another
    `window` of the penalties; other values do not.

    **Arguments:**

    - `temperature`: 0 decodes greedily, that is, always takes the most likely token. A positive,
        finite number samples and needs a `key`; see [`mamba_eqx.sampling.temperature`][]. Per row;
        greedy and sampled rows may be mixed. Default: 0.
    - `top_k`: keeps this many most likely tokens, an integer of at least 1; see
        [`mamba_eqx.sampling.top_k`][]. Per row. Default: `None`, which keeps all tokens.
    - `top_p`: keeps the most likely tokens of this total probability, `0 < top_p <= 1`; see
        [`mamba_eqx.sampling.top_p`][]. Per row. Default: `None`.
    - `min_p`: keeps the tokens that are at least this many times as likely as the most likely one,
        `0 <= min_p <= 1`; see [`mamba_eqx.sampling.min_p`][]. Per row. Default: `None`.
    - `typical_p`: keeps the most typical tokens of this total probability, `0 < typical_p <= 1`;
        see [`mamba_eqx.sampling.typical_p`][]. Per row. Default: `None`.
    - `penalties`: penalties for repeating earlier tokens, a [`mamba_eqx.sampling.Penalties`][].
        Default: `None`.
    - `logit_bias`: numbers added to the logits after the penalties: a mapping from token ids, or an
        array of shape `(vocab_size,)`. Finite, or `-inf` to ban a token. Default: `None`.
    - `stop_tokens`: token ids. A row ends with the first of them that it generates. One sequence
        for all rows, or a sequence of such sequences, one for each row. Default: `()`.
    - `stop_strings`: non-empty strings. A row ends with the token that completes one of them within
        the generated text, at whatever byte of a token the string begins and ends. Default: `()`.
    - `tokenizer`: required by `stop_strings`, otherwise unused. Default: `None`.

    **Raises:** `ValueError` if an option is out of its range, or if `stop_strings` come without a
    `tokenizer`. Token ids and numbers of rows are checked against the model and the prompts when
    the options are used.
    """

    temperature: PerRow = 0.0
    top_k: PerRowInt | None = None
    top_p: PerRow | None = None
    min_p: PerRow | None = None
    typical_p: PerRow | None = None
    penalties: Penalties | None = None
    logit_bias: (
        Mapping[int, float] | Float[Array, " vocab"] | Float[np.ndarray, " vocab"] | None
    ) = None
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = ()
    stop_strings: Sequence[str] = ()
    tokenizer: Tokenizer | None = None

    def __post_init__(self):
        _check_each("temperature", self.temperature, _check_temperature_or_greedy)
        _check_each("top_k", self.top_k, check_top_k)
        _check_each("top_p", self.top_p, check_top_p)
        _check_each("min_p", self.min_p, check_min_p)
        _check_each("typical_p", self.typical_p, check_typical_p)
        if self.logit_bias is not None:
            _check_bias(self.logit_bias)
        if has_rows(self.stop_tokens):
            for i, tokens in enumerate(self.stop_tokens):
                check_token_ids(f"stop_tokens[{i}]", tokens)
        else:
            check_token_ids("stop_tokens", self.stop_tokens)
        if self.stop_strings:
            _check_stop_strings(self.stop_strings, self.tokenizer)


def check_supported(function: str, sampling: Sampling, unsupported: Sequence[str]) -> None:
    """Raises `ValueError` if options are set that the function of this name cannot honour."""
    check_sampling(sampling)
    for name in unsupported:
        value = getattr(sampling, name)
        if _is_set(name, value):
            raise ValueError(
                f"`{function}` does not support `{name}`, but got {name}={value!r}. Leave it out, "
                "or use `generate`."
            )


def _is_set(name: str, value: object) -> bool:
    if name == "temperature":
        return bool(np.any(np.asarray(value) != 0))
    return bool(value) if name == "stop_strings" else value is not None


def check_sampling(sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise ValueError(
            f"`sampling` must be a `Sampling`, but got {sampling!r}. Give, for example, "
            "`mbx.Sampling(temperature=0.8)`."
        )


def has_rows(stop_tokens: Sequence[int] | Sequence[Sequence[int]]) -> bool:
    """Returns whether there is one sequence of stop tokens for each row."""
    is_sequence = isinstance(stop_tokens, Sequence) and len(stop_tokens) > 0
    return is_sequence and np.ndim(stop_tokens[0]) > 0


def _check_each(name: str, value: object, check: Callable[[object], None]) -> None:
    if value is None and name != "temperature":
        return
    each = np.asarray(value)
    if each.ndim == 0:
        check(value)
    elif each.ndim == 1:
        for one in each:
            check(one)
    else:
        raise ValueError(
            f"`{name}` must be one number, or one for each row, but got an array of shape "
            f"{each.shape}."
        )


def _check_temperature_or_greedy(value: object) -> None:
    if isinstance(value, bool | str) or value != 0:
        check_temperature(value)


def _check_stop_strings(strings: Sequence[str], tokenizer: Tokenizer | None) -> None:
    if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"`stop_strings` must be a list of non-empty strings, but got {strings!r}."
        )
    if tokenizer is None:
        raise ValueError(
            f"`stop_strings` must come with a `tokenizer`, but got stop_strings={strings!r} and no "
            "tokenizer. Give the `tokenizer` of the model, which knows the text of each token."
        )


def _check_bias(bias: Mapping[int, float] | Array | np.ndarray) -> None:
    values = bias
    if isinstance(bias, Mapping):
        for token, value in bias.items():
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise ValueError(f"The keys of `logit_bias` must be token ids, but got {token!r}.")
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise ValueError(f"The values of `logit_bias` must be numbers, but got {value!r}.")
        values = list(bias.values())
    dense = np.asarray(values, np.float32)
    if np.isnan(dense).any() or (dense == math.inf).any():
        raise ValueError("`logit_bias` must be finite, or `-inf` to ban a token.")


GREEDY = Sampling()
"""The default options."""
