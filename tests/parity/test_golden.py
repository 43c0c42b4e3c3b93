"""Agreement with golden files, which other implementations have computed in float64."""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, state_dict
from tests.support.parity import GOLDEN, GOLDEN_LAYOUTS, difference, named_state, run


# `XLA_FLAGS= pytest` compiles as users do, and the newest Python is tested with nothing else.
pytestmark = [pytest.mark.usefixtures("compile_fast")] if os.environ.get("XLA_FLAGS") else []


# The quick run omits these cases, because similar cases cover most of their code.
SLOW = {
    "mamba_tied",
    "state_spaces_mamba",
    "state_spaces_mamba2",
    "bamba_tiny",
    "jamba_tiny",
    "granite_tiny",
    "falcon_h1_tiny",
    "state_spaces_hybrid",
    "state_spaces_mamba3",
    "state_spaces_mamba3_mimo",
}
HYBRIDS = {"bamba_tiny", "jamba_tiny", "granite_tiny", "falcon_h1_tiny", "state_spaces_hybrid"}
CASES = [
    pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in GOLDEN_LAYOUTS
]


@pytest.mark.parametrize("case", CASES)
def test_golden_float64(case: str):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    with jax.enable_x64(True):
        model = from_pretrained(GOLDEN / case, dtype=jnp.float64)
        loss, logits, states, hidden, grads = run(model, jnp.asarray(golden["tokens"]))
        got: dict[str, Any] = {"loss": loss, "logits": logits, "hidden_states.norm_f": hidden[-1]}
        for i, state in enumerate(states):
            got |= {f"hidden_states.{i}": hidden[i]} | named_state(i, state, golden)
        named = state_dict(grads, layout=GOLDEN_LAYOUTS[case])
        got |= {f"grad.{name}": grad for name, grad in named.items()}
        assert got.keys() == golden.keys() - {"tokens", "greedy", "logits_float32"}
        for name in golden:
            if name.endswith(".conv"):
                # Nothing that follows uses the oldest column.
                golden[name] = golden[name][:, 1:]
        off = {name: difference(got[name], golden[name]) for name in got}
    assert max(off.values()) < (1e-12 if case in HYBRIDS else 1e-10), off


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN_LAYOUTS)
def test_golden_float32(case: str):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    model = from_pretrained(GOLDEN / case)
    if case in HYBRIDS:
        logits = eqx.filter_jit(model)(jnp.asarray(golden["tokens"]))
        assert difference(logits, golden["logits"]) < 1e-5
        out = mbx.generate(model, golden["tokens"], len(golden["greedy"]))
        assert np.array_equal(out.tokens, golden["greedy"])
        return
    logits, state = eqx.filter_jit(model.scan)(jnp.asarray(golden["tokens"]))
    assert logits.dtype == jnp.float32
    assert difference(logits, golden["logits"]) < 1e-5
    if "logits_float32" in golden:
        assert difference(logits, golden["logits_float32"]) < 1e-5
    step, tokens, last = eqx.filter_jit(model.step), [], logits[-1]
    while len(tokens) < len(golden["greedy"]):
        tokens.append(jnp.argmax(last))
        last, state = step(tokens[-1], state)
    assert np.array_equal(tokens, golden["greedy"])
