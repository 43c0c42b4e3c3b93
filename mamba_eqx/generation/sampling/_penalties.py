"""Penalties for repeating earlier tokens: functions of logits and of the last tokens.

The last tokens are padded with -1, which is not a token id, if the text is shorter than the window.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..._checks import check_count
from ._checks import LARGEST, PerRow, check_each, read_number


def repetition_penalty(
    logits: Float[Array, " vocab"],
    recent: Int[Array, " window"],
    value: float | Float[Array, ""],
) -> Float[Array, " vocab"]:
    r"""Makes the tokens less likely that occur in `recent`:

    $$l_i \leftarrow l_i / \theta \text{ if } l_i > 0 \text{ else } l_i \theta.$$

    Reference: Keskar et al., *CTRL: A Conditional Transformer Language Model for Controllable
    Generation* (2019), section 4.1, in the form that transformers gave it for negative logits.

    **Arguments:**

    - `logits`: the logits of one position, of shape `(vocab_size,)`.
    - `recent`: the ids of the last tokens, of shape `(window,)`, padded with -1.
    - `value`: the penalty $\theta$, positive. 1 changes nothing; less than 1 rewards repetition.

    **Returns:**

    The new logits.
    """
    value = jnp.asarray(value, logits.dtype)
    penalised = jnp.where(logits > 0, logits / value, logits * value)
    return jnp.where(_counts(logits, recent) > 0, penalised, logits)


def presence_penalty(
    logits: Float[Array, " vocab"],
    recent: Int[Array, " window"],
    value: float | Float[Array, ""],
) -> Float[Array, " vocab"]:
    r"""Subtracts `value` from the logits of the tokens that occur in `recent`:
    $l_i \leftarrow l_i - \alpha [c_i > 0]$, where $c_i$ is the number of occurrences, as the OpenAI
    API defines it.

    **Arguments:**

    - `logits`: the logits of one position, of shape `(vocab_size,)`.
    - `recent`: the ids of the last tokens, of shape `(window,)`, padded with -1.
    - `value`: the penalty $\alpha$. 0 changes nothing; less than 0 rewards repetition.

    **Returns:**

    The new logits.
    """
    return logits - jnp.asarray(value, logits.dtype) * jnp.minimum(_counts(logits, recent), 1)


def frequency_penalty(
    logits: Float[Array, " vocab"],
    recent: Int[Array, " window"],
    value: float | Float[Array, ""],
) -> Float[Array, " vocab"]:
    r"""Subtracts `value` from the logit of a token for each of its occurrences in `recent`:
    $l_i \leftarrow l_i - \alpha c_i$, where $c_i$ is the number of occurrences, as the OpenAI API
    defines it.

    **Arguments:**

    - `logits`: the logits of one position, of shape `(vocab_size,)`.
    - `recent`: the ids of the last tokens, of shape `(window,)`, padded with -1.
    - `value`: the penalty $\alpha$. 0 changes nothing; less than 0 rewards repetition.

    **Returns:**

    The new logits.
    """
    return logits - jnp.asarray(value, logits.dtype) * _counts(logits, recent)


def _counts(
    logits: Float[Array, " vocab"], recent: Int[Array, " window"]
) -> Float[Array, " vocab"]:
    vocab = logits.shape[0]
    index = jnp.where(recent < 0, vocab, recent)
    return jnp.zeros_like(logits).at[index].add(jnp.ones((), logits.dtype), mode="drop")


class Penalties(eqx.Module):
    """Penalties for repeating earlier tokens, applied in this order:
    [`mamba_eqx.sampling.repetition_penalty`][], [`mamba_eqx.sampling.presence_penalty`][],
    [`mamba_eqx.sampling.frequency_penalty`][].

    The penalties look at the last `window` tokens, prompt included, like those of llama.cpp.
    (transformers looks at all tokens: for that, give a window as long as the whole text.)

    **Arguments:**

    - `repetition`: positive and finite: one number, or one for each row. Default: 1, no penalty.
    - `presence`: finite: one number, or one for each row. Default: 0, no penalty.
    - `frequency`: finite: one number, or one for each row. Default: 0, no penalty.
    - `window`: the number of last tokens to look at, at least 1. Another value recompiles.
        Default: 64.

    **Raises:** `ValueError` if a number is out of range.
    """

    repetition: PerRow = 1.0
    presence: PerRow = 0.0
    frequency: PerRow = 0.0
    window: int = eqx.field(static=True, default=64)

    def __check_init__(self):
        check_each("repetition", self.repetition, _check_repetition)
        check_each("presence", self.presence, lambda value: _check_term("presence", value))
        check_each("frequency", self.frequency, lambda value: _check_term("frequency", value))
        try:
            check_count("window", self.window)
        except ValueError as error:
            raise ValueError(f"`Penalties`: {error} Give the number of last tokens.") from None


def _check_repetition(value: object) -> None:
    number = read_number("repetition", value)
    if number is not None and not 0 < number <= LARGEST:
        raise ValueError(
            "`repetition` of `Penalties` must be positive and finite, but got "
            f"repetition={number}. Use 1 for no penalty."
        )


def _check_term(name: str, value: object) -> None:
    number = read_number(name, value)
    if number is not None and not -LARGEST <= number <= LARGEST:
        raise ValueError(
            f"`{name}` of `Penalties` must be finite, but got {name}={number}. Use 0 for no "
            "penalty."
        )


def penalise(
    logits: Float[Array, " vocab"], recent: Int[Array, " window"], penalties: Penalties
) -> Float[Array, " vocab"]:
    """Applies all penalties of one row to the logits of one token."""
    recent = recent[-penalties.window :]
    logits = repetition_penalty(logits, recent, jnp.asarray(penalties.repetition))
    logits = presence_penalty(logits, recent, jnp.asarray(penalties.presence))
    return frequency_penalty(logits, recent, jnp.asarray(penalties.frequency))
