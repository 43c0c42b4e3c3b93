"""Where transformers' Nemotron-H differs from its own config, and the names of its parameters."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_eqx.pretrained import from_pretrained, save_pretrained
from tests.support.parity import difference, their_logits, their_model
from tests.support.parity_models import THEIRS


pytestmark = [pytest.mark.slow, pytest.mark.parity]

TOKENS = np.arange(12) * 11 % 29


def test_transformers_ignores_the_limits_of_dt(torch, tmp_path):
    """The library differs from transformers where transformers differs from the config."""
    theirs = their_model(
        torch, THEIRS["nemotron_h"]["dense"] | {"time_step_limit": [0.0, 1e9]}, "nemotron_h"
    )
    with torch.no_grad():
        for layer in theirs.model.layers:
            if hasattr(layer.mixer, "dt_bias"):
                # Step sizes below the smallest initial step size, 0.001.
                layer.mixer.dt_bias.fill_(-9.0)
                layer.mixer.in_proj.weight[-6:].fill_(0.0)
                layer.mixer.in_proj.bias[-6:].fill_(0.0)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    logits = eqx.filter_jit(ours)(jnp.asarray(TOKENS))
    assert difference(logits, their_logits(torch, theirs, TOKENS)) < 1e-5
    assert difference(logits, unpatched_logits(torch, tmp_path / "theirs")) > 1e-3
    # transformers computes what the config says if we write it.
    save_pretrained(ours, tmp_path / "ours")
    assert difference(logits, unpatched_logits(torch, tmp_path / "ours")) < 1e-5


def unpatched_logits(torch: Any, folder: Path) -> np.ndarray:
    """Returns the logits of transformers as it is, with its mistake."""
    import transformers  # pyright: ignore[reportMissingImports]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return their_logits(torch, model, TOKENS)


def test_loads_the_names_of_transformers_in_memory(torch, tmp_path):
    theirs = their_model(torch, THEIRS["nemotron_h"]["dense"], "nemotron_h")
    theirs.save_pretrained(tmp_path / "file")
    theirs.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert eqx.tree_equal(from_pretrained(tmp_path / "memory"), from_pretrained(tmp_path / "file"))
