"""Agreement of Mamba-3's recurrence with the official references in plain torch."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from mamba_eqx import ops
from tests.support.parity import GOLDEN, difference, nearest_turn


pytestmark = pytest.mark.slow


@pytest.fixture
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", ["sequential", "chunked"])
@pytest.mark.parametrize("name", ["siso", "mimo", "mimo_full"])
def test_official_references(name: str, method: Any, in_float64: None):
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
