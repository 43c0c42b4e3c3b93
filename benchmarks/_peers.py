"""Other libraries that run the weights of a model of ours. All of them are optional."""

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


def check_agrees(name: str, theirs: Any, ours: jax.Array, tolerance: float = 1e-3) -> None:
    """Raises a `RuntimeError` if the outputs of a peer differ from ours."""
    want = np.asarray(ours)
    error = np.max(np.abs(np.asarray(theirs) - want)) / np.max(np.abs(want))
    if not error < tolerance:
        raise RuntimeError(f"The outputs of {name} differ from ours by {error:.2g} (relative).")
    print(f"{name} agrees with mamba_eqx: relative difference {error:.1g}.\n", flush=True)
