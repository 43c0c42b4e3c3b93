"""The validated options of a generation, as the arrays that the compiled loop takes."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree, UInt32

from ._sampling import Sampling, check_sampling, dense_bias
from ._stopping import Stopping, stopping_for
from .sampling import (
    LARGEST,
    Filters,
    Penalties,
    PerRow,
    PerRowInt,
    filtered,
    greedy,
    keep_only,
    penalise,
    sample_filtered,
    shorten,
)


class Options(eqx.Module):
    """A [`mamba_eqx.Sampling`][] as arrays, with the key.

    For a batch, all arrays except the stop table have a leading axis of rows. Because values are
    arrays, only turning an option on or off recompiles. `temperature` is `None` if all rows are
    greedy; otherwise a row is greedy if its temperature is 0.
    """

    temperature: Float[Array, "*batch"] | None
    filters: Filters
    penalties: Penalties | None
    bias: Float[Array, "*batch vocab"] | None
    stopping: Stopping
    key: Key[Array, "*batch"] | UInt32[Array, "*batch 2"] | None
    """`None` if all rows are greedy."""
    any_greedy: bool = eqx.field(static=True)
    """Whether some rows are greedy and others are not."""

    @property
    def window(self) -> int:
        """The number of last tokens that the penalties depend on."""
        return 1 if self.penalties is None else self.penalties.window

    def choose(
        self,
        logits: Float[Array, " vocab"],
        recent: Int[Array, " window"],
        position: Int[Array, ""],
        allowed: Bool[Array, " vocab"] | None = None,
    ) -> Int[Array, ""]:
        """Chooses the token that follows `position`, among all tokens or those `allowed`.

        The random numbers depend on the key and on `position` only.
        """
        logits = self._penalised(logits, recent)
        if allowed is not None:
            logits = keep_only(logits, allowed)
        if self.temperature is None or self.key is None:
            return greedy(logits)
        key = jr.fold_in(self.key, position)
        token = sample_filtered(logits, key, self._positive(self.temperature), self.filters)
        if self.any_greedy:
            token = jnp.where(self.temperature > 0, token, greedy(logits))
        return token

    def distribution(
        self, logits: Float[Array, " vocab"], recent: Int[Array, " window"]
    ) -> Float[Array, " vocab"]:
        """Returns the logits of the distribution that a token is drawn from.

        Under greedy decoding, all logits but the largest are `-inf`.
        """
        logits = self._penalised(logits, recent)
        if self.temperature is None:
            return _only_best(logits)
        kept = filtered(logits, self._positive(self.temperature), self.filters)
        if self.any_greedy:
            best = _only_best(logits.astype(kept.dtype))
            kept = jnp.where(self.temperature > 0, kept, best)
        return kept

    def row_axes(self) -> PyTree[int | None]:
        """Returns the `in_axes` of `jax.vmap` over rows: 0, except for the stop table, which all
        rows share."""
        axes = jax.tree.map(lambda _: 0, self)
        is_none = lambda leaf: leaf is None
        return eqx.tree_at(lambda axes: axes.stopping.table, axes, None, is_leaf=is_none)

    def _penalised(
        self, logits: Float[Array, " vocab"], recent: Int[Array, " window"]
    ) -> Float[Array, " vocab"]:
        if self.penalties is not None:
            logits = penalise(logits, recent, self.penalties)
        return logits if self.bias is None else logits + self.bias.astype(logits.dtype)

    def _positive(self, temperature: Float[Array, ""]) -> Float[Array, ""]:
        """Replaces a temperature of 0 by 1, since the sampler divides by the temperature.

        Greedy rows do not use the token that is drawn.
        """
        if not self.any_greedy:
            return temperature
        return jnp.where(temperature > 0, temperature, jnp.ones_like(temperature))


def options_for(
    sampling: Sampling, vocab_size: int, rows: int | None, key: PRNGKeyArray | None
) -> Options:
    """Validates options against a vocabulary and a number of rows, and converts them to arrays.

    **Arguments:**

    - `sampling`: the options.
    - `vocab_size`: the number of token ids of the model.
    - `rows`: the number of rows, or `None` for one prompt without a batch axis.
    - `key`: one key for all rows. Row `i` of a batch gets `jax.random.fold_in(key, i)`.

    **Returns:**

    The options as arrays.

    **Raises:** `ValueError` if an option does not fit the vocabulary or the rows, or if a key is
    needed and missing.
    """
    check_sampling(sampling)
    temperature = _per_row(rows, "temperature", sampling.temperature, np.float32, LARGEST)
    filters = Filters(
        _top_k(rows, sampling.top_k, vocab_size),
        _optional(rows, "top_p", sampling.top_p),
        _optional(rows, "min_p", sampling.min_p),
        _optional(rows, "typical_p", sampling.typical_p),
    )
    samples = bool((temperature > 0).any())
    if samples:
        _check_key(key, sampling.temperature)
    if samples and rows is not None:
        key = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(rows))  # pyright: ignore
    return Options(
        temperature=jnp.asarray(temperature) if samples else None,
        filters=filters if samples else Filters(),
        penalties=_penalties(rows, sampling.penalties),
        bias=_dense_bias(vocab_size, rows, sampling.logit_bias),
        stopping=stopping_for(sampling, vocab_size, rows),
        key=key if samples else None,
        any_greedy=samples and bool((temperature == 0).any()),
    )


def _only_best(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    best = jnp.arange(logits.shape[0]) == jnp.argmax(logits)
    return jnp.where(best, jnp.zeros_like(logits), jnp.full_like(logits, -jnp.inf))


def _per_row(
    rows: int | None,
    name: str,
    value: PerRow | PerRowInt,
    dtype: npt.DTypeLike,
    most: float | int = LARGEST,
) -> np.ndarray:
    """Returns an option, clipped to `most`, as an array: one number for each row, or a scalar
    without a batch."""
    each = np.asarray(value)
    if each.ndim > 0 and (rows is None or each.shape != (rows,)):
        wanted = "one number" if rows is None else f"one number, or one for each of {rows} rows"
        raise ValueError(f"`{name}` must be {wanted}, but got an array of shape {each.shape}.")
    each = np.asarray(np.minimum(each, most), dtype)
    return each if rows is None else np.broadcast_to(each, (rows,))


def _optional(
    rows: int | None,
    name: str,
    value: PerRow | PerRowInt | None,
    most: float | int = LARGEST,
) -> Array | None:
    return None if value is None else jnp.asarray(_per_row(rows, name, value, np.float32, most))


def _top_k(rows: int | None, value: PerRowInt | None, vocab_size: int) -> Array | None:
    """Returns the option, or `None` if every row keeps all tokens, which is also written as 0."""
    if value is None:
        return None
    each = _per_row(rows, "top_k", value, np.int32, most=vocab_size)
    return jnp.asarray(np.where(each == 0, vocab_size, each)) if each.any() else None


def _penalties(rows: int | None, penalties: Penalties | None) -> Penalties | None:
    if penalties is None:
        return None
    value = lambda name, value: jnp.asarray(_per_row(rows, name, value, np.float32))
    return Penalties(
        repetition=value("repetition", penalties.repetition),
        presence=value("presence", penalties.presence),
        frequency=value("frequency", penalties.frequency),
        window=penalties.window,
    )


def _dense_bias(
    vocab_size: int, rows: int | None, bias: Mapping[int, float] | Array | np.ndarray | None
) -> Float[Array, "*batch vocab"] | None:
    if bias is None:
        return None
    dense = dense_bias(bias, vocab_size)
    if (dense == -np.inf).all():
        raise ValueError("`logit_bias` must leave at least one token, but bans every token.")
    return jnp.asarray(dense if rows is None else np.broadcast_to(dense, (rows, vocab_size)))


def _check_key(key: object, temperature: PerRow) -> None:
    if key is None:
        raise ValueError(
            f"Sampling with temperature={shorten(temperature)} needs a key. Give "
            "`key=jax.random.key(0)`, or `temperature=0` for greedy decoding."
        )
    if not _is_key(key):
        raise ValueError(
            f"`key` must be one key made by `jax.random.key`, but got key={shorten(key)}. Give, "
            "for example, `key=jax.random.key(0)`."
        )


def _is_key(key: object) -> bool:
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.ndim == 1 and key.dtype == jnp.uint32
