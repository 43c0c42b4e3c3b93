"""How a token is chosen from logits, and when a row ends: the options of a generation."""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from ..models import LanguageModel
from ._prompts import check_tokens
from .sampling import (
    Penalties,
    check_min_p,
    check_temperature,
    check_top_k,
    check_top_p,
    check_typical_p,
    filtered as _filtered,
    frequency_penalty,
    greedy,
    presence_penalty,
    repetition_penalty,
    sample,
)


class Choice(eqx.Module):
    """How a token is chosen and when a row ends. The values are arrays, so that only turning an
    option on or off recompiles. A temperature of `None` is greedy, as is one of 0 in a row."""

    temperature: Float[Array, "*batch"] | None
    top_k: Int[Array, "*batch"] | None
    top_p: Float[Array, "*batch"] | None
    min_p: Float[Array, "*batch"] | None
    typical_p: Float[Array, "*batch"] | None
    penalties: tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]] | None
    bias: Float[Array, "*batch vocab"] | None
    stop_tokens: Int[Array, "*batch stop"]
    window: int = eqx.field(static=True)
    some_greedy: bool = eqx.field(static=True)

    def logits(
        self, logits: Float[Array, " vocab"], recent: Int[Array, " window"]
    ) -> Float[Array, " vocab"]:
        """After penalties and bias, on which greedy decoding depends as well."""
        if self.penalties is not None:
            recent = recent[-self.window :]
            repetition, presence, frequency = self.penalties
            logits = repetition_penalty(logits, recent, repetition)
            logits = presence_penalty(logits, recent, presence)
            logits = frequency_penalty(logits, recent, frequency)
        return logits if self.bias is None else logits + self.bias.astype(logits.dtype)

    def distribution(
        self, logits: Float[Array, " vocab"], recent: Int[Array, " window"]
    ) -> Float[Array, " vocab"]:
        """The logits from which a token is drawn: of greedy decoding, `-inf` for all but one."""
        logits = self.logits(logits, recent)
        if self.temperature is None:
            return _only_best(logits)
        filtered = self._with_options(_filtered)(logits)
        if self.some_greedy:
            greedy = _only_best(logits.astype(filtered.dtype))
            filtered = jnp.where(self.temperature > 0, filtered, greedy)
        return filtered

    def choose(
        self,
        logits: Float[Array, " vocab"],
        recent: Int[Array, " window"],
        key: PRNGKeyArray | None,
    ) -> Int[Array, ""]:
        logits = self.logits(logits, recent)
        if self.temperature is None or key is None:
            return greedy(logits)
        token = self._with_options(sample)(logits, key)
        if self.some_greedy:
            token = jnp.where(self.temperature > 0, token, greedy(logits))
        return token

    def _with_options(self, function: Callable[..., Array]) -> Callable[..., Array]:
        temperature = self.temperature
        assert temperature is not None
        if self.some_greedy:
            # In a greedy row nothing is drawn.
            temperature = jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))
        return functools.partial(
            function,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
        )


def _only_best(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    best = jnp.arange(logits.shape[0]) == jnp.argmax(logits)
    return jnp.where(best, jnp.zeros_like(logits), jnp.full_like(logits, -jnp.inf))


def read_choice(
    model: LanguageModel,
    rows: int | None,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    typical_p: Any,
    penalties: Penalties | None,
    logit_bias: Mapping[int, float] | Array | np.ndarray | None,
    stop_tokens: Any,
    key: Any,
) -> Choice:
    """The options of a generation, checked. With a batch, one of each for every row."""
    bias = read_bias(model.vocab_size, logit_bias)
    value = functools.partial(_option, rows)
    heat = np.asarray(value("temperature", temperature, _check_heat, np.float32))
    if (heat > 0).any():
        if key is None:
            raise ValueError(
                f"Sampling with temperature={temperature} needs a key: give "
                "`key=jax.random.key(0)`, or `temperature=0` for greedy decoding."
            )
        if not _is_key(key):
            raise ValueError(f"`key` must be one key made by `jax.random.key`, but got {key!r}.")
    filters = (
        value("top_k", top_k, check_top_k, np.int64),
        value("top_p", top_p, check_top_p, np.float32),
        value("min_p", min_p, check_min_p, np.float32),
        value("typical_p", typical_p, check_typical_p, np.float32),
    )
    if (heat == 0).all():
        heat, filters = None, (None, None, None, None)
    k, *shares = filters
    against = None
    if penalties is not None:
        against = (
            value("repetition", penalties.repetition, None, np.float32),
            value("presence", penalties.presence, None, np.float32),
            value("frequency", penalties.frequency, None, np.float32),
        )
    if bias is not None and rows is not None:
        bias = np.broadcast_to(bias, (rows, len(bias)))
    arrays = jax.tree.map(
        jnp.asarray,
        (
            heat,
            None if k is None else np.minimum(k, model.vocab_size).astype(np.int32),
            *shares,
            against,
            bias,
            _read_stop_tokens(model.vocab_size, rows, stop_tokens),
        ),
    )
    return Choice(
        *arrays,
        window=1 if penalties is None else penalties.window,
        some_greedy=heat is not None and bool((heat == 0).any()),
    )


def _option(
    rows: int | None, name: str, value: Any, check: Callable[[Any], None] | None, dtype: Any
) -> np.ndarray | None:
    if value is None:
        return None
    each = np.asarray(value)
    if each.ndim == 0:
        if check is not None:
            check(value)
    elif rows is None or each.shape != (rows,):
        wanted = "one number" if rows is None else f"one number, or one for each of {rows} rows"
        raise ValueError(f"`{name}` must be {wanted}, but got an array of shape {each.shape}.")
    elif check is not None:
        for one in each:
            check(one)
    each = each.astype(dtype)
    return each if rows is None else np.broadcast_to(each, (rows,))


def _check_heat(value: Any) -> None:
    if isinstance(value, bool | str) or value != 0:
        check_temperature(value)


def _read_stop_tokens(vocab_size: int, rows: int | None, tokens: Any) -> np.ndarray:
    nested = isinstance(tokens, Sequence) and len(tokens) > 0 and np.ndim(tokens[0]) > 0
    if not nested:
        one = check_tokens(vocab_size, "stop_tokens", tokens)
        return one if rows is None else np.broadcast_to(one, (rows, len(one)))
    if rows is None or len(tokens) != rows:
        raise ValueError(
            "`stop_tokens` must be a list of tokens, or one such list for each row, but got "
            f"{len(tokens)} lists for {'one prompt' if rows is None else f'{rows} rows'}."
        )
    each = [check_tokens(vocab_size, f"stop_tokens[{i}]", row) for i, row in enumerate(tokens)]
    padded = np.full((rows, max(map(len, each))), -1, np.int32)
    for padded_row, row in zip(padded, each, strict=True):
        padded_row[: len(row)] = row
    return padded


def _is_key(key: Any) -> bool:
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.ndim == 1 and key.dtype == jnp.uint32


PerRow = float | Float[Array, " rows"] | Float[np.ndarray, " rows"] | Sequence[float]
"""An option: one number, or one for each row."""
PerRowInt = int | Integer[Array, " rows"] | Integer[np.ndarray, " rows"] | Sequence[int]


def read_bias(
    vocab_size: int, bias: Mapping[int, float] | Array | np.ndarray | None
) -> Float[np.ndarray, " vocab"] | None:
    """What is added to the logits, checked."""
    if bias is None:
        return None
    if isinstance(bias, Mapping):
        dense = np.zeros(vocab_size, np.float32)
        for token, value in bias.items():
            is_int = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not is_int or not 0 <= token < vocab_size:
                raise ValueError(
                    f"The keys of `logit_bias` must be tokens within 0..{vocab_size - 1}, but got "
                    f"{token!r}."
                )
            dense[token] = _check_bias(value)
    else:
        dense = np.asarray(bias, np.float32)
        if dense.shape != (vocab_size,):
            raise ValueError(
                f"`logit_bias` must be a mapping from tokens, or an array of shape "
                f"({vocab_size},), one for each token, but got one of shape {dense.shape}."
            )
    if np.isnan(dense).any() or (dense == math.inf).any():
        raise ValueError("`logit_bias` must be finite, or `-inf` to ban a token.")
    if (dense == -math.inf).all():
        raise ValueError("`logit_bias` bans every token: there is none left to generate.")
    return dense


def _check_bias(value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"The values of `logit_bias` must be numbers, but got {value!r}.")
    return float(value)
