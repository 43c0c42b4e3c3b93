"""This library. The form is that of the weights, with options after commas: `float32, stacked`."""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import mamba_eqx as mbx

from ._serve import Contestant, Request, Task, serve


class MambaEqx(Contestant):
    """A model, compiled for each task."""

    def __init__(self, request: Request):
        weights, *options = request.form.split(", ")
        self._narrow = weights == "bfloat16"
        self._loop = "loop over step" in options
        model = mbx.from_pretrained(request.folder, dtype=jnp.float32)
        remat: Any = "remat" in options
        if "remat but products" in options:
            remat = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        if "stacked" in options or remat:
            form = mbx.Stacked if "stacked" in options else mbx.Unrolled
            try:
                layers = form(model.layers.unstack(), remat=remat)
            except ValueError as reason:  # The layers of hybrids differ.
                raise NotImplementedError(str(reason)) from None
            model = eqx.tree_at(lambda model: model.layers, model, layers)
        # What is trained has float32 parameters; what is read by every token may be narrower.
        self._trained: mbx.LanguageModel | None = model
        self._model: mbx.LanguageModel = model
        if self._narrow:
            self._model = mbx.cast(model, jnp.bfloat16)
        elif weights.endswith(" bits"):
            if "without kernel" in options:
                os.environ["MAMBA_EQX_NATIVE"] = "0"
            bits = 8 if weights == "8 bits" else 4
            self._trained, self._model = None, mbx.quantize(model, bits=bits)
        arrays = jax.tree.leaves(eqx.filter(self._model, eqx.is_array))
        self.weight_bytes = sum(array.nbytes for array in arrays)
        if self._model.lm_head is not None:
            self.weight_bytes -= self._model.embedding.weight.nbytes  # Only one row is read.

    def prefill(self, tokens: np.ndarray, *, all_logits: bool) -> Task:
        """See `Contestant.prefill`."""

        def logits(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
            return model(tokens) if all_logits else model.logits(model.backbone(tokens)[0][-1])

        return _compiled(
            logits, self._model, jnp.asarray(tokens, jnp.int32), read=lambda y: {"logits": y}
        )

    def decode(self, prompts: np.ndarray, new: int) -> Task:
        """See `Contestant.decode`."""
        model = self._model
        if self._loop:
            run = _loop_over_step(model, prompts, new)
        else:
            given = prompts if len(prompts) > 1 else prompts[0]

            def run() -> jax.Array:
                return jax.block_until_ready(mbx.generate(model, given, new).tokens)

        return Task(run, lambda tokens: {"tokens": np.reshape(tokens, (len(prompts), -1))})

    def train(self, tokens: np.ndarray) -> Task:
        """See `Contestant.train`. In bfloat16, the parameters and the loss stay float32."""
        if self._trained is None:
            raise NotImplementedError("integer weights have no gradients")

        def loss(model: mbx.LanguageModel, tokens: jax.Array) -> jax.Array:
            used = mbx.cast(model, jnp.bfloat16) if self._narrow else model
            # `vmap` over one sequence is slower than the sequence alone.
            logits = used(tokens) if tokens.ndim == 1 else jax.vmap(used)(tokens)
            log_probs = jax.nn.log_softmax(logits[..., :-1, :].astype(jnp.float32))
            return -jnp.mean(jnp.take_along_axis(log_probs, tokens[..., 1:, None], axis=-1))

        given = jnp.asarray(tokens if len(tokens) > 1 else tokens[0], jnp.int32)
        return _compiled(
            eqx.filter_value_and_grad(loss),
            self._trained,
            given,
            read=lambda y: {"loss": y[0], "gradient": y[1].embedding.weight},
        )


def _compiled(function: Any, model: mbx.LanguageModel, tokens: jax.Array, *, read: Any) -> Task:
    # Arrays are inputs of the compiled function, so XLA cannot fold them as constants.
    arrays, static = eqx.partition(model, eqx.is_array)
    program = (
        jax.jit(lambda arrays, tokens: function(eqx.combine(arrays, static), tokens))
        .lower(arrays, tokens)
        .compile()
    )
    analysis = program.memory_analysis()
    memory = None if analysis is None else analysis.temp_size_in_bytes / 2**20
    return Task(lambda: jax.block_until_ready(program(arrays, tokens)), read, memory)


def _loop_over_step(model: mbx.LanguageModel, prompts: np.ndarray, new: int) -> Any:
    if isinstance(model.layers, mbx.Stacked):
        model = eqx.tree_at(lambda model: model.layers, model, model.layers.separate())

    @jax.jit
    def step(model: mbx.LanguageModel, token: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        logits, state = jax.vmap(model.step)(token, state)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), state

    batch = len(prompts)
    empty = jax.tree.map(
        lambda t: jnp.broadcast_to(t, (batch, *t.shape)), model.init_state(max_len=new)
    )

    def run() -> jax.Array:
        token, state, tokens = jnp.asarray(prompts[:, 0], jnp.int32), empty, []
        for _ in range(new):
            token, state = step(model, token, state)
            tokens.append(token)
        return jax.block_until_ready(jnp.stack(tokens, axis=1))

    return run


if __name__ == "__main__":
    serve(MambaEqx, ("mamba_eqx", "mamba_eqx_native", "jax", "jaxlib", "equinox"))
