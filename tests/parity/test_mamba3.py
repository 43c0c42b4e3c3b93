"""Agreement of Mamba-3 with the official code: its references in plain torch, alone and in place of
the kernels inside of the official language model (`golden/make_golden_mamba3.py`)."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mamba_eqx import ops
from mamba_eqx.pretrained import from_pretrained, state_dict
from tests.support.parity import GOLDEN, difference, nearest_turn, run


MODELS = ["state_spaces_mamba3", "state_spaces_mamba3_mimo"]


@pytest.fixture
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("name", ["siso", "mimo", "mimo_full"])
def test_the_official_references(name: str, method: Any, in_float64: None):
    golden = load_file(GOLDEN / "mamba3_ref" / "golden.safetensors")
    golden = {k.removeprefix(f"{name}."): v for k, v in golden.items() if k.startswith(f"{name}.")}
    inputs = {k: v for k, v in golden.items() if f"grad.{k}" in golden}
    siso = name == "siso"

    def objective(inputs: Any) -> Any:
        rank = (lambda a: a[..., None, :, :]) if siso else (lambda a: a)
        bias = (lambda a: a[:, None]) if siso else (lambda a: a)
        state = None
        if siso:
            angle, h, k, v = (inputs[f"state.{s}"][0] for s in ("angle", "ssm", "k", "v"))
            state = angle, h, k[None], v
        y, (angle, h, k, v) = ops.mamba3(
            inputs["V"][0],
            inputs["DT"][0].T,
            inputs["A"][0].T,
            rank(inputs["K"][0]),
            rank(inputs["Q"][0]),
            inputs["D"],
            trap=jax.nn.sigmoid(inputs["Trap"][0].T),
            angles=jnp.pi * jnp.tanh(inputs["Angles"][0, :, 0]),
            B_bias=bias(inputs["K_bias"]),
            C_bias=bias(inputs["Q_bias"]),
            mimo_x=inputs.get("MIMO_V"),
            interleaved=siso,
            state=state,
            method=method,
            chunk_size=5,
        )
        out = {"y": y[:, 0], "k": k[0]} if siso else {"y": y, "k": k}
        out |= {"angle": angle, "ssm": h, "v": v}
        return sum(jnp.sum(golden[f"weight.{k}"][0] * v) for k, v in out.items()), out

    grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, out), grads = grad({k: jnp.asarray(v) for k, v in inputs.items()})
    off = {k: difference(v, golden[k][0]) for k, v in out.items() if k != "angle"}
    off["angle"] = difference(nearest_turn(out["angle"], golden["angle"][0]), golden["angle"][0])
    off |= {f"grad.{k}": difference(v, golden[f"grad.{k}"]) for k, v in grads.items()}
    assert max(off.values()) < 1e-10, off


@pytest.mark.parametrize("case", MODELS)
def test_golden_float64(case: str, in_float64: None):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    model = from_pretrained(GOLDEN / case, dtype=jnp.float64)
    loss, logits, states, hidden, grads = run(model, jnp.asarray(golden["tokens"]))
    got = {"loss": loss, "logits": logits, "hidden_states.norm_f": hidden[-1]}
    for i, state in enumerate(states):
        got[f"hidden_states.{i}"] = hidden[i]
        got[f"state.{i}.angle"] = nearest_turn(state.angle, golden[f"state.{i}.angle"])
        got |= {f"state.{i}.ssm": state.ssm, f"state.{i}.k": state.k, f"state.{i}.v": state.v}
    got |= {f"grad.{k}": v for k, v in state_dict(grads, layout="state-spaces").items()}
    assert got.keys() == golden.keys() - {"tokens", "greedy"}
    off = {name: difference(got[name], golden[name]) for name in got}
    assert max(off.values()) < 1e-10, off


@pytest.mark.parametrize("case", MODELS)
def test_golden_float32(case: str):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    model = from_pretrained(GOLDEN / case)
    logits, state = eqx.filter_jit(model.scan)(jnp.asarray(golden["tokens"]))
    assert logits.dtype == jnp.float32
    assert difference(logits, golden["logits"]) < 1e-5
    step, tokens, last = eqx.filter_jit(model.step), [], logits[-1]
    while len(tokens) < len(golden["greedy"]):
        tokens.append(jnp.argmax(last))
        last, state = step(tokens[-1], state)
    assert np.array_equal(tokens, golden["greedy"])
