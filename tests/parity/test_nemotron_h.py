"""Agreement with transformers' Nemotron-H: everything in float64, and the limits of `dt`."""

import contextlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict
from tests.support.parity import (
    difference,
    named_state,
    run,
    their_logits,
    their_model,
)
from tests.support.parity_models import THEIRS


pytestmark = [pytest.mark.slow, pytest.mark.parity]

TOKENS = np.arange(12) * 11 % 29
# The layers of a file that our blocks end with, and those that hold the mixers.
ENDS = {"dense": [0, 2, 3, 5, 7], "experts": [1, 3, 4], "latent": [1, 3]}
MIXERS = {"dense": [0, 1, 3, 4, 6], "experts": [0, 2, 4], "latent": [0, 2]}


@contextlib.contextmanager
def honest_float64(torch: Any, monkeypatch: pytest.MonkeyPatch):
    """Keeps transformers from computing parts in float32, whatever the dtype of its weights."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def their_answers(torch: Any, model: Any, name: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns what golden files record of a model, computed in float64."""
    hidden: list[Any] = []
    for module in (*model.model.layers, model.model.norm_f):
        module.register_forward_hook(lambda module, args, out: hidden.append(out))
    tokens = torch.tensor(TOKENS)
    with honest_float64(torch, patch):
        logits = model(tokens[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
        loss.backward()
        answers = {
            f"hidden_states.{i}": hidden[end][0]
            for i, end in enumerate([*ENDS[name], len(model.model.layers)])
        }
        with torch.no_grad():
            cache = model(tokens[None], use_cache=True).cache
            chosen = tokens
            for _ in range(8):
                best = model(chosen[None], use_cache=False).logits[0, -1].argmax()
                chosen = torch.cat([chosen, best[None]])
    for i, place in enumerate(MIXERS[name]):
        layer = cache.layers[place]
        if hasattr(layer, "keys"):
            answers |= {f"state.{i}.k": layer.keys[0], f"state.{i}.v": layer.values[0]}
        else:
            # Nothing that follows uses the oldest column.
            answers[f"state.{i}.conv"] = layer.conv_states[0][0][:, 1:]
            answers[f"state.{i}.ssm"] = layer.recurrent_states[0][0]
    for name, parameter in model.named_parameters():
        answers[f"grad.{name.replace('model.', 'backbone.', 1)}"] = parameter.grad
    answers |= {"logits": logits, "loss": loss, "greedy": chosen[len(tokens) :]}
    return {name: value.detach().numpy() for name, value in answers.items()}


def whole_experts(named: dict[str, Any]) -> dict[str, Any]:
    """Joins the arrays of experts, which are one array in transformers in memory."""
    whole: dict[str, Any] = {}
    for name, array in named.items():
        module, _, rest = name.partition(".experts.")
        if rest:
            end = rest.split(".")[1]
            whole.setdefault(f"{module}.experts.{end}", []).append(array)
        else:
            whole[name] = array
    return {k: np.stack(v) if isinstance(v, list) else v for k, v in whole.items()}


@pytest.mark.parametrize("name", THEIRS["nemotron_h"])
def test_agrees_in_float64(name, torch, monkeypatch, tmp_path):
    theirs = their_model(torch, THEIRS["nemotron_h"][name], "nemotron_h")
    theirs.save_pretrained(tmp_path)
    want = their_answers(torch, theirs.double(), name, monkeypatch)
    with jax.enable_x64(True):
        ours = from_pretrained(tmp_path, dtype=jnp.float64)
        loss, logits, states, hidden, grads = run(ours, jnp.asarray(TOKENS))
        got: dict[str, Any] = {"loss": loss, "logits": logits}
        got |= {f"hidden_states.{i}": stream for i, stream in enumerate(hidden)}
        for i, state in enumerate(states):
            got |= named_state(i, state, {})
        got |= {f"grad.{name}": grad for name, grad in whole_experts(state_dict(grads)).items()}
        # A buffer in transformers.
        biases = [got.pop(name) for name in [*got] if name.endswith("e_score_correction_bias")]
        assert not np.any(biases)
        greedy = mbx.generate(ours, TOKENS, 8).tokens
        assert np.array_equal(greedy, want.pop("greedy"))
        assert got.keys() == want.keys()
        off = {name: difference(got[name], want[name]) for name in got}
    assert max(off.values()) < 1e-12, off


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
