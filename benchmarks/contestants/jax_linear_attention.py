"""jax-linear-attention, which runs "its plain-JAX implementation" on a CPU (its README).

Its kernels are for one kind of GPU; the chunked operations measured here are what it falls back to
on every other device.
"""

import importlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._serve import Contestant, Request, Task, config, serve, tensors


configs = importlib.import_module("jla.models.config")
inference = importlib.import_module("jla.inference")
language_model = importlib.import_module("jla.models.lm")


class JaxLinearAttention(Contestant):
    """A language model of its Mamba-1 mixers, with layers that are compiled one by one."""

    def __init__(self, request: Request):
        values, self._arrays = config(request.folder), tensors(request.folder)
        layers = values["num_hidden_layers"]
        options = configs.ModelConfig(
            vocab_size=values["vocab_size"],
            d_model=values["hidden_size"],
            n_layers=layers,
            d_ff=0,
            # Unused by stacks of Mamba, but required.
            attention=configs.AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=16),
            ssm=configs.SSMConfig(
                d_state=values["state_size"],
                dt_rank=values["time_step_rank"],
                conv_size=values["conv_kernel"],
            ),
            layer_types=("mamba1",) * layers,
            mlp_types=("none",) * layers,
            norm_eps=values["layer_norm_epsilon"],
            compute_dtype=request.form,
            remat="none",
            scan_layers=False,
        )
        model = eqx.filter_eval_shape(
            lambda: language_model.LanguageModel(options, key=jax.random.key(0))
        )
        self._model: Any = jax.tree_util.tree_map_with_path(self._leaf, model)
        leaves = jax.tree.leaves(eqx.filter(self._model, eqx.is_array))
        self.weight_bytes = sum(leaf.nbytes for leaf in leaves)

    def _leaf(self, path: tuple[object, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            stem = f"backbone.layers.{layer}."
            name = stem + rest.replace("mixer_norm", "norm").replace("mixer.conv.", "mixer.conv1d.")
            name = name.replace("mixer.dt_bias", "mixer.dt_proj.bias")
        elif name == "embed.weight":
            name = "backbone.embeddings.weight"
        elif name == "final_norm.weight":
            name = "backbone.norm_f.weight"
        found = self._arrays[name]
        if name.endswith("in_proj.weight"):
            found = found.T.reshape(like.shape)
        elif name.endswith("_proj.weight"):
            found = found.T
        return jnp.asarray(found.reshape(like.shape), like.dtype)

    def prefill(self, tokens: np.ndarray, *, all_logits: bool) -> Task:
        """See `Contestant.prefill`."""

        @eqx.filter_jit
        def logits(model: Any, tokens: jax.Array) -> jax.Array:
            hidden = model(tokens[None], inference=True).hidden[0]
            return model.logits(hidden if all_logits else hidden[-1:])

        given = jnp.asarray(tokens, jnp.int32)
        return Task(
            lambda: jax.block_until_ready(logits(self._model, given)), lambda y: {"logits": y}
        )

    def decode(self, prompts: np.ndarray, new: int) -> Task:
        """See `Contestant.decode`."""
        # A bucket of one token keeps the prompt at its length.
        return Task(
            lambda: inference.generate(self._model, prompts.tolist(), max_new_tokens=new, bucket=1),
            lambda y: {"tokens": y.tokens},
        )

    def train(self, tokens: np.ndarray) -> Task:
        """See `Contestant.train`."""

        @eqx.filter_jit
        @eqx.filter_value_and_grad
        def step(model: Any, tokens: jax.Array) -> jax.Array:
            logits = model.logits(model(tokens, inference=True).hidden)[:, :-1]
            log_probs = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

        given = jnp.asarray(tokens, jnp.int32)
        return Task(
            lambda: jax.block_until_ready(step(self._model, given)),
            lambda y: {"loss": y[0], "gradient": y[1].embed.weight},
        )


if __name__ == "__main__":
    serve(JaxLinearAttention, ("jax-linear-attention", "jax", "equinox"))
