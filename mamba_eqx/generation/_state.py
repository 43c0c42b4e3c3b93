"""Fine-tuning by the initial state alone."""

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._language_model import LanguageModel
from .._prompts import WINDOW, DecodingState
from .._protocol import checked_state


def begin(model: LanguageModel, state: PyTree, token: Int[Array, ""] | int) -> DecodingState:
    """A generation that begins from a state of the layers, such as a learned one, with a token.

    A recurrent model can be fine-tuned by its initial state alone: a pytree like
    `model.init_state()` is trained, and the model stays as it is. The result is a prefix that no
    text could express:

    ```python
    loss, grads = jax.value_and_grad(lambda state: loss_of(model.scan(tokens, state)))(state)
    ...
    prefix = begin(model, state, tokenizer.encode("\\n")[0])
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
