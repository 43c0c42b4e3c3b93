"""Comparisons with golden files and with transformers as installed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree
from safetensors.numpy import load_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import assert_same


GOLDEN = Path(__file__).parents[1] / "golden"

# The layout of each golden checkpoint.
GOLDEN_LAYOUTS = {
    "mamba_tiny": "transformers",
    "mamba_tied": "transformers",
    "state_spaces_mamba": "state-spaces",
    "mamba2_tiny": "transformers",
    "falcon_tiny": "transformers",
    "state_spaces_mamba2": "state-spaces",
    "bamba_tiny": "transformers",
    "jamba_tiny": "transformers",
    "granite_tiny": "transformers",
    "falcon_h1_tiny": "transformers",
    "state_spaces_hybrid": "state-spaces",
    "state_spaces_mamba3": "state-spaces",
    "state_spaces_mamba3_mimo": "state-spaces",
}


def difference(got: Any, want: Any) -> float:
    """Returns the largest difference, relative to the largest entry of `want`."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.all(np.isfinite(got))
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def nearest_turn(got: Any, want: Any) -> np.ndarray:
    """Returns the angles `got`, each shifted by the whole turns that bring it closest to `want`."""
    got = np.asarray(got, np.float64)
    return got - 2 * np.pi * np.round((got - want) / (2 * np.pi))


class Run(NamedTuple):
    """Everything that a golden file records of one model and one text."""

    loss: Array
    logits: Array
    states: tuple[Any, ...]
    hidden: PyTree
    grads: mbx.LanguageModel


@eqx.filter_jit
def run(model: mbx.LanguageModel, tokens: Array) -> Run:
    """Computes loss, logits, final states, hidden states and gradients."""

    def loss(model: mbx.LanguageModel) -> tuple[Array, tuple[Array, Any]]:
        logits, state = model.scan(tokens)
        log_probs = jax.nn.log_softmax(logits[:-1])
        of_targets = jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)
        return -jnp.mean(of_targets), (logits, state)

    (value, (logits, state)), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return Run(value, logits, state, model.hidden_states(tokens), grads)


# The multipliers of keys and values in the case `falcon_h1_tiny`. Our cache does not contain them:
# the softmax scale and the scale of the output do.
FALCON_CACHE = {"k": 1.2 * 0.8, "v": 1.2}


def named_state(i: int, state: Any, golden: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the arrays of the state of layer `i` under the names and shapes of golden files."""
    if isinstance(state, tuple):
        mamba, cache = (named_state(i, part, golden) for part in state)
        return mamba | {name: FALCON_CACHE[name[-1]] * cache[name] for name in cache}
    if isinstance(state, mbx.KVCache):
        return {f"state.{i}.k": state.k, f"state.{i}.v": state.v}
    if isinstance(state, mbx.Mamba3State):
        angle = nearest_turn(state.angle, golden[f"state.{i}.angle"])
        named = {"angle": angle, "ssm": state.ssm, "k": state.k, "v": state.v}
        return {f"state.{i}.{name}": array for name, array in named.items()}
    return {f"state.{i}.conv": state.conv.T, f"state.{i}.ssm": jnp.moveaxis(state.ssm, 0, -1)}


def as_described(model: Any) -> Any:
    """Makes a transformers model compute what its config says, and returns it.

    In Nemotron-H, transformers takes `time_step_min`, which is meant for the initialisation, for
    the lower limit of `dt`, and ignores `time_step_limit` (transformers issue 48989). The grouped
    products of experts in torch need float32 and sizes that are multiples of 4.
    """
    for module in model.modules():
        if type(module).__name__ == "NemotronHMamba2Mixer":
            module.time_step_limit = tuple(model.config.time_step_limit)
        if type(module).__name__.endswith("Experts"):
            model.set_experts_implementation("eager")
    return model


def their_model(torch: Any, fields: dict[str, Any], model_type: str = "mamba") -> Any:
    """Builds a transformers model with random weights."""
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = as_described(transformers.AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.3 * torch.randn_like(buffer)
    return model


@contextlib.contextmanager
def honest_float64(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps transformers from computing parts in float32, whatever the dtype of its weights."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def their_logits(torch: Any, model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits of a transformers model."""
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].float().numpy()


def load_theirs(folder: Path | str, architecture: str = "MambaForCausalLM") -> Any:
    """Loads a checkpoint with transformers and asserts that all tensors matched.

    transformers itself only warns about tensors that it does not find.
    """
    import transformers  # pyright: ignore[reportMissingImports]

    load = getattr(transformers, architecture).from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    return as_described(model.eval())


def check_they_load(
    torch: Any,
    model: mbx.LanguageModel,
    folder: Path,
    architecture: str,
    *,
    seq: int = 25,
    max_shard_size: int | None = 2000,
) -> None:
    """Asserts that transformers loads what we save, bit by bit, and computes the same logits."""
    model = jax.tree.map(lambda leaf: 0.5 * leaf, model)
    save_pretrained(model, folder, max_shard_size=max_shard_size)
    theirs = load_theirs(folder, architecture)
    tokens = np.arange(seq) * 7 % 13
    logits = eqx.filter_jit(model)(jnp.asarray(tokens))
    assert difference(logits, their_logits(torch, theirs, tokens)) < 1e-5
    theirs.save_pretrained(folder / "again")
    assert_same(load_file(folder / "again" / "model.safetensors"), state_dict(model))


# Fields of a transformers config that we do not keep: how texts end, and the model's origin.
NOT_KEPT = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"}


def check_we_load(
    torch: Any,
    theirs: Any,
    folder: Path,
    changed: set[str],
    *,
    seq: int = 25,
    max_shard_size: str = "3KB",
) -> tuple[np.ndarray, np.ndarray]:
    """Asserts that we load what transformers saves, and that transformers loads what we save of it.

    The configs must agree except in the fields `changed`. Returns the logits of transformers before
    and after the round trip.
    """
    theirs.save_pretrained(folder / "theirs", max_shard_size=max_shard_size)
    model = from_pretrained(folder / "theirs")
    tokens = np.arange(seq) * 11 % 29
    want = their_logits(torch, theirs, tokens)
    assert difference(eqx.filter_jit(model)(jnp.asarray(tokens)), want) < 1e-5

    save_pretrained(model, folder / "ours")
    back = load_theirs(folder / "ours", type(theirs).__name__)
    there, here = theirs.config.to_dict(), back.config.to_dict()
    assert {k for k in there if there[k] != here.get(k)} <= NOT_KEPT | changed
    return want, their_logits(torch, back, tokens)
