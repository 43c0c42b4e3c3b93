"""A small model and LoRA for tests, and the names of PEFT's files."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array

import mamba_eqx as mbx
from mamba_eqx.training import LoRA
from tests.support.cases import quick


WEIGHTS = "adapter_model.safetensors"
VOCAB = 11
TOKENS = jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6])
MAMBA = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))


def make(
    *,
    stacked: bool = False,
    layers: tuple[mbx.BlockConfig, ...] = (MAMBA,) * 2,
    tied: bool = False,
) -> mbx.LanguageModel:
    """Builds a model, with a head of its own unless `tied`."""
    config = mbx.LanguageModelConfig(VOCAB, layers, tie_embeddings=tied)
    return config.build(stacked=stacked, key=jr.key(0))


def noisy(lora: LoRA, seed: int = 1) -> LoRA:
    """Returns the same LoRA with random values, as if it had been trained."""
    leaves, structure = jax.tree.flatten(lora)
    keys = jr.split(jr.key(seed), len(leaves))
    new = [0.3 * jr.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


@quick
def logits(model: mbx.LanguageModel, lora: LoRA | None = None) -> Array:
    """Returns the logits of a model, or of a model merged with a LoRA."""
    return (model if lora is None else lora.merge(model))(TOKENS)
