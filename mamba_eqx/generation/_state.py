"""Fine-tuning by the initial state alone."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._trees import repeated
from ..layers import checked_state
from ..models import LanguageModel


WINDOW = 64  # the fewest last tokens that a state keeps


class DecodingState(eqx.Module):
    """Where a generation has come to: everything that it takes to go on.

    Of the whole sequence so far (prompt and generated tokens), `layers` has seen all tokens but
    the last one. That one is `token`: going on begins by feeding it to the model, which gives the
    logits of the next token. `position` counts the tokens that `layers` has seen; the random
    numbers of a token depend on the key and on its position, and on nothing else.

    `recent` are the last tokens, `token` the last of them, for penalties; -1 stands for none.

    With a batch every leaf has a first axis of rows.
    """

    layers: PyTree
    token: Int[Array, "*batch"]
    position: Int[Array, "*batch"]
    recent: Int[Array, "*batch window"]


def fork(state: DecodingState, rows: int) -> DecodingState:
    """The state of one sequence as that of a batch: `rows` times the same past.

    **Raises:** `ValueError` if it is one of a batch already.
    """
    if state.token.ndim:
        raise ValueError(
            f"`fork` takes the state of one sequence, but got one of {state.token.shape[0]} rows."
        )
    return repeated(state, rows)


def decoding_state(
    model: LanguageModel, state: PyTree, token: Int[Array, ""] | int
) -> DecodingState:
    """A generation that begins from a state of the layers, such as a learned one, with a token.

    A recurrent model can be fine-tuned by its initial state alone: a pytree like
    `model.init_state()` is trained, and the model stays as it is. The result is a prefix that no
    text could express:

    ```python
    loss, grads = jax.value_and_grad(lambda state: loss_of(model.scan(tokens, state)))(state)
    ...
    prefix = decoding_state(model, state, tokenizer.encode("\\n")[0])
    out = mbx.generate(model, prompt, 100, state=prefix)
    ```

    **Arguments:**

    - `model`: whose state it is.
    - `state`: of its layers. The caches of [`mamba_eqx.Attention`][] can hold no learned past: what
        they begin with is not read.
    - `token`: the first token of the text. In training, sequences should begin with it too.

    **Returns:** the state, for [`mamba_eqx.generate`][], [`mamba_eqx.save_state`][] and all others
    that take one. The prompts given with it come after `token`.

    **Raises:** `ValueError` for a state of another structure, or a token that the model lacks.

    Reference: Galim et al., *Parameter-Efficient Fine-Tuning of State Space Models* (2024).
    """
    if isinstance(token, int) and not 0 <= token < model.vocab_size:
        raise ValueError(f"`token` must be within 0..{model.vocab_size - 1}, but got {token}.")
    token = jnp.asarray(token, jnp.int32)
    return DecodingState(
        layers=checked_state(model.layers, state),
        token=token,
        position=jnp.zeros((), jnp.int32),
        recent=jnp.full(WINDOW, -1, jnp.int32).at[-1].set(token),
    )
