"""Other libraries that run the weights of a model of ours. All of them are optional."""

import importlib
import importlib.util
import logging
import tempfile
import warnings
from typing import Any

import jax
import numpy as np
from _common import cores

import mamba_eqx as mbx


def available(package: str) -> bool:
    """Returns whether a package is installed."""
    return importlib.util.find_spec(package) is not None


# The peers that run each mixer on a CPU and can read our weights.
_PEERS = {"mamba1": ("transformers", "mambapy", "llama_cpp"), "mamba2": ("transformers",)}


def has(package: str, mixer: str) -> bool:
    """Returns whether a package is installed and has models of this mixer."""
    return available(package) and package in _PEERS.get(mixer, ())


def mamba1_config(model: mbx.LanguageModel) -> mbx.Mamba1Config:
    """Returns the config of the mixers of a model of Mamba-1 layers."""
    config = mbx.LanguageModelConfig.of(model).layers[0].mixer
    assert isinstance(config, mbx.Mamba1Config)
    return config


def transformers_model(model: mbx.LanguageModel) -> Any:
    """Loads a model of ours into transformers, through a checkpoint written by `save_pretrained`.

    Without CUDA kernels transformers runs its own path in PyTorch: a Python loop over time for
    Mamba-1, chunks of 256 tokens for Mamba-2.
    """
    import torch
    import transformers

    torch.set_num_threads(cores())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mbx.save_pretrained(model, folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        return load(folder, dtype=torch.float32).eval()


def mambapy_model(model: mbx.LanguageModel) -> Any:
    """Loads a model of ours into mamba.py's blocks, which run a parallel scan in PyTorch.

    The embedding, the final norm and the head are defined here, because `mambapy.lm` cannot be
    imported without mamba_ssm.
    """
    import torch

    mambapy = importlib.import_module("mambapy.mamba")
    torch.set_num_threads(cores())
    mixer = mamba1_config(model)
    config = mambapy.MambaConfig(
        d_model=mixer.d_model,
        n_layers=model.layers.n_layer,
        dt_rank=mixer.dt_rank,
        d_state=mixer.d_state,
        d_conv=mixer.d_conv,
    )

    class LanguageModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = torch.nn.Embedding(model.padded_vocab_size, mixer.d_model)
            self.layers = mambapy.Mamba(config)
            self.norm_f = mambapy.RMSNorm(mixer.d_model, config.rms_norm_eps, False)

        def forward(self, tokens: Any) -> Any:
            x = self.norm_f(self.layers(self.embeddings(tokens)))
            return x @ self.embeddings.weight.T

        def step(self, token: Any, caches: Any) -> tuple[Any, Any]:
            x, caches = self.layers.step(self.embeddings(token), caches)
            return self.norm_f(x) @ self.embeddings.weight.T, caches

        def empty(self, batch: int) -> list[tuple[None, Any]]:
            inputs = torch.zeros(batch, config.d_inner, config.d_conv - 1)
            return [(None, inputs) for _ in range(config.n_layers)]

    # The head is the embedding, and transformers' names differ from mamba.py's by a prefix only.
    tensors = {}
    for name, tensor in mbx.state_dict(model, layout="transformers").items():
        name = name.removeprefix("backbone.").replace("layers.", "layers.layers.", 1)
        if not name.startswith("lm_head"):
            tensors[name] = torch.from_numpy(np.array(tensor))
    peer = LanguageModel()
    peer.load_state_dict(tensors)
    return peer.eval()


def check_agrees(name: str, theirs: Any, ours: jax.Array, tolerance: float = 1e-3) -> None:
    """Raises a `RuntimeError` if the outputs of a peer differ from ours."""
    want = np.asarray(ours)
    error = np.max(np.abs(np.asarray(theirs) - want)) / np.max(np.abs(want))
    if not error < tolerance:
        raise RuntimeError(f"The outputs of {name} differ from ours by {error:.2g} (relative).")
    print(f"{name} agrees with mamba_eqx: relative difference {error:.1g}.\n", flush=True)
