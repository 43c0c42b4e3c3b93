"""Agreement with transformers' models of experts in everything, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, state_dict
from tests.support.parity import difference, honest_float64, named_state, run, their_model
from tests.support.parity_models import THEIRS


pytestmark = [pytest.mark.slow, pytest.mark.parity]

# Without 0, which Jamba takes for padding, so that its embedding has no gradient.
TOKENS = 1 + np.arange(12) * 11 % 28
CASES = [
    ("jamba", "experts"),
    ("granitemoehybrid", "experts"),
    *[("nemotron_h", name) for name in THEIRS["nemotron_h"]],
]
# In Nemotron-H, the layers of the file that our blocks end with, and those that hold the mixers.
ENDS = {"dense": [0, 2, 3, 5, 7], "experts": [1, 3, 4], "latent": [1, 3]}
MIXERS = {"dense": [0, 1, 3, 4, 6], "experts": [0, 2, 4], "latent": [0, 2]}


def final_norm(backbone: Any) -> Any:
    """Returns the final norm, which has another name in each model type."""
    names = ("norm_f", "final_layernorm", "norm")
    return next(getattr(backbone, name) for name in names if hasattr(backbone, name))


def their_answers(
    torch: Any, model: Any, ends: list[int], mixers: list[int], patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Returns what golden files record of a model, computed in float64.

    The indices are those of the layers that our blocks end with, and of those with the mixers.
    """
    backbone, hidden = model.model, []
    for module in (*backbone.layers, final_norm(backbone)):
        module.register_forward_hook(
            lambda module, args, out: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
    tokens = torch.tensor(TOKENS)
    with honest_float64(torch, patch):
        logits = model(tokens[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:])
        loss.backward()
        answers = {
            f"hidden_states.{i}": hidden[end][0]
            for i, end in enumerate([*ends, len(backbone.layers)])
        }
        with torch.no_grad():
            cache = model(tokens[None], use_cache=True).cache
            chosen = tokens
            for _ in range(8):
                best = model(chosen[None], use_cache=False).logits[0, -1].argmax()
                chosen = torch.cat([chosen, best[None]])
    for i, place in enumerate(mixers):
        layer = cache.layers[place]
        if hasattr(layer, "keys"):
            answers |= {f"state.{i}.k": layer.keys[0], f"state.{i}.v": layer.values[0]}
        else:
            # Nothing that follows uses the oldest column.
            answers[f"state.{i}.conv"] = layer.conv_states[0][0][:, 1:]
            answers[f"state.{i}.ssm"] = layer.recurrent_states[0][0]
    answers |= {"logits": logits, "loss": loss, "greedy": chosen[len(tokens) :]}
    return {name: value.detach().numpy() for name, value in answers.items()}


def their_gradients(torch: Any, model: Any, folder: Any) -> dict[str, np.ndarray]:
    """Returns the gradients under the names of files, which differ from those in memory."""
    from safetensors.numpy import load_file

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_agrees_in_float64(model_type, name, torch, monkeypatch, tmp_path):
    theirs = their_model(torch, THEIRS[model_type][name], model_type)
    theirs.save_pretrained(tmp_path / "model")
    every = [*range(len(theirs.model.layers))]
    ends, mixers = (ENDS[name], MIXERS[name]) if model_type == "nemotron_h" else (every, every)
    want = their_answers(torch, theirs.double(), ends, mixers, monkeypatch)
    with jax.enable_x64(True):
        ours = from_pretrained(tmp_path / "model", dtype=jnp.float64)
        loss, logits, states, hidden, grads = run(ours, jnp.asarray(TOKENS))
        got: dict[str, Any] = {"loss": loss, "logits": logits}
        got |= {f"hidden_states.{i}": stream for i, stream in enumerate(hidden)}
        for i, state in enumerate(states):
            got |= named_state(i, state, {})
        greedy = mbx.generate(ours, TOKENS, 8).tokens
        assert np.array_equal(greedy, want.pop("greedy"))
        named = {name: np.asarray(grad) for name, grad in state_dict(grads).items()}
    # A buffer in transformers.
    biases = [named.pop(name) for name in [*named] if name.endswith("e_score_correction_bias")]
    assert not np.any(biases)
    gradients = their_gradients(torch, theirs, tmp_path / "gradients")
    got |= {f"grad.{name}": grad for name, grad in named.items()}
    want |= {
        f"grad.{name}": grad
        for name, grad in gradients.items()
        if not name.endswith("e_score_correction_bias")
    }
    assert got.keys() == want.keys()
    # Experts that no token chose have no gradient.
    zero = {name for name in want if not np.any(want[name])}
    assert not any(np.any(got[name]) for name in zero)
    off = {name: difference(got[name], want[name]) for name in got.keys() - zero}
    assert max(off.values()) < 1e-12, sorted(off.items(), key=lambda item: -item[1])[:8]
