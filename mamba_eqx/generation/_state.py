"""The state of a generation, a value that can be copied, saved and continued from."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, PyTree

from .._checks import check_count
from .._trees import repeated
from ..layers import checked_state
from ..models import LanguageModel
from .sampling import shorten


WINDOW = 64  # the minimum number of last tokens that a state keeps


class DecodingState(eqx.Module):
    """A point in a generation: everything needed to continue it.

    With a batch, every leaf has a leading axis of rows.

    - `layers`: the state of the model's layers, which have consumed all tokens of the prompt and of
        the generation except the last one.
    - `token`: this last token. To continue, `generate` runs it first, which gives the logits of the
        next token.
    - `position`: the number of tokens that the layers have consumed. The random numbers of a token
        depend on the key and on its position only.
    - `recent`: the last tokens, including `token`, for penalties. -1 where the text is shorter.
    """

    layers: PyTree
    token: Int[Array, "*batch"]
    position: Int[Array, "*batch"]
    recent: Int[Array, "*batch window"]


def fork(state: DecodingState, rows: int) -> DecodingState:
    """Copies the state of one sequence into a batch of rows with the same past.

    **Arguments:**

    - `state`: the state of one sequence, without an axis of rows.
    - `rows`: the number of copies.

    **Returns:**

    A state whose leaves have a leading axis of size `rows`.

    **Raises:** `ValueError` if the state has a batch axis already, or if `rows` is not an integer
    of at least 1.
    """
    check_count("rows", rows)
    if state.token.ndim:
        raise ValueError(
            "`state` must be the state of one sequence, but got a state of "
            f"{state.token.shape[0]} rows. Fork the state before it is continued as a batch."
        )
    return repeated(state, rows)


def decoding_state(
    model: LanguageModel, state: PyTree, token: Int[Array, ""] | int
) -> DecodingState:
    """Makes the state of a generation from a layer state, such as a learned one, and a first token.

    A recurrent model can be fine-tuned by its initial state alone: a pytree like
    `model.init_state()` is trained while the model's parameters stay fixed. The result is a prefix
    that no text could express:

    ```python
    loss, grads = jax.value_and_grad(lambda state: loss_of(model.scan(tokens, state)))(state)
    ...
    prefix = decoding_state(model, state, tokenizer.encode("\\n")[0])
    out = mbx.generate(model, prompt, 100, state=prefix)
    ```

    **Arguments:**

    - `model`: the model that the state belongs to.
    - `state`: the state of its layers, a pytree like `model.init_state()`. The caches of
        [`mamba_eqx.Attention`][] cannot hold a learned past: their initial content is never read.
    - `token`: the id of the first token of the text, a scalar. Training sequences should begin
        with this token too.

    **Returns:**

    A state for [`mamba_eqx.generate`][], [`mamba_eqx.save_state`][] and all other
    functions that take one. Prompts given together with this state follow `token`.

    **Raises:** `ValueError` for a state of another structure, or for a token id that is not one
    integer within the vocabulary (a value traced by JAX is not checked).

    Reference: Galim et al., *Parameter-Efficient Fine-Tuning of State Space Models* (2024).
    """
    try:
        # JAX would take a text for the name of a dtype.
        given = token if isinstance(token, Array) else np.asarray(token)
        shape, dtype = given.shape, given.dtype
    except (TypeError, ValueError, OverflowError):  # Lists of different lengths.
        shape, dtype = None, np.dtype(object)
    if shape != () or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"`token` must be one token id, but got token={shorten(token)}. Give the id of the "
            "first token as an integer."
        )
    if not isinstance(token, Tracer) and not 0 <= int(token) < model.vocab_size:
        raise ValueError(
            f"`token` must be within 0..{model.vocab_size - 1}, but got {token}. Give a token id "
            "of this model's tokenizer."
        )
    token = jnp.asarray(token, jnp.int32)
    return DecodingState(
        layers=checked_state(model.layers, state),
        token=token,
        position=jnp.zeros((), jnp.int32),
        recent=jnp.full(WINDOW, -1, jnp.int32).at[-1].set(token),
    )
