"""Options and parts of layers that no quick golden file covers, against their equations."""

import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.cases import assert_close, fold, scan, step
from tests.support.registry import (
    SIZES,
    block,
    gated_delta_net,
    gated_mlp,
    make_inputs,
    make_layer,
    mamba1,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


KEY = jr.key(0)
S = SIZES[0]
X = jr.normal(KEY, (3, 4))


@pytest.mark.parametrize("limits", [(0.5, math.inf), (0.0, 0.5)])
def test_mamba2_clips_step_sizes(limits: tuple[float, float]):
    """A step size beyond a limit equals the limit."""

    def run(bias: float, limits: tuple[float, float]) -> Any:
        layer = mbx.Mamba2(4, d_state=3, headdim=2, dt_limit=limits, key=KEY)
        # The step sizes depend on nothing but the bias.
        weight = layer.in_proj.weight.at[-layer.nheads :].set(0.0)
        parameters = lambda m: (m.in_proj.weight, m.dt_bias)
        layer = eqx.tree_at(parameters, layer, (weight, jnp.full(layer.nheads, bias)))
        return scan(layer, X, layer.init_state())

    beyond = -3.0 if limits[0] else 3.0
    assert_close(run(beyond, limits), run(math.log(math.expm1(0.5)), (0.0, math.inf)), "float32")


def test_floor_of_mamba3_bounds_the_rate_of_decay():
    """With a large floor, nothing remains of the hidden state."""
    for floor, remains in ((1e-4, True), (1e6, False)):
        layer = mbx.Mamba3(4, d_state=4, headdim=2, A_floor=floor, key=KEY)
        empty = layer.init_state()
        full = eqx.tree_at(lambda state: state.ssm, empty, jnp.ones_like(empty.ssm))
        outputs = [step(layer, X[0], state)[0] for state in (empty, full)]
        assert np.any(outputs[0] != outputs[1]) == remains


def test_block_normalises_the_input_of_its_mlp():
    layer = block(mamba1, mlp=gated_mlp)(S, "float32", KEY)
    weight = jnp.linspace(0.5, 1.5, S.d_model)
    layer = eqx.tree_at(lambda b: b.norm2.weight, layer, weight)
    without_mlp = eqx.tree_at(lambda b: (b.norm2, b.mlp), layer, (None, None))
    x, state = jr.normal(KEY, (S.d_model,)), layer.init_state()
    y = step(without_mlp, x, state)[0]
    want = y + layer.mlp(weight * y / jnp.sqrt(jnp.mean(y**2) + 1e-5))
    assert_close(step(layer, x, state)[0], want, "float32")


def test_tied_head_is_the_embedding():
    model = make_layer("language_model", S, "float32", 0)
    features = np.linspace(-1.0, 1.0, S.d_model, dtype=np.float32)
    assert_close(model.logits(jnp.asarray(features)), model.embedding.weight @ features, "float32")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_gated_delta_net_equals_its_equations():
    """The reference computes one head and one token at a time, in float64."""
    ngroups, heads = 2, 3
    layer = gated_delta_net(ngroups=ngroups, heads_per_group=heads, norm_eps=0.03)(
        S, "float32", KEY
    )
    weight = np.linspace(0.5, 1.5, layer.headdim)
    layer = eqx.tree_at(lambda m: m.norm.weight, layer, jnp.asarray(weight, jnp.float32))
    x = make_inputs("gated_delta_net", S, 6, "float32", 0)
    in_proj, conv, out_proj, A, bias = (
        np.asarray(a, np.float64)
        for a in (
            layer.in_proj.weight,
            layer.conv1d.weight,
            layer.out_proj.weight,
            layer.A,
            layer.dt_bias,
        )
    )
    N, P, H = S.d_state, layer.headdim, ngroups * heads
    ends = np.cumsum([ngroups * N, ngroups * N, H * P, H * P, H])
    *qkv, z, beta, dt = np.split(x.astype(np.float64) @ in_proj.T, ends, axis=-1)
    u = np.concatenate(qkv, axis=-1)
    before = np.concatenate([np.zeros((S.d_conv - 1, u.shape[1])), u])
    u = silu(np.stack([conv[i] * before[i : i + len(u)] for i in range(S.d_conv)]).sum(0))
    q, k, v = np.split(u, ends[:2], axis=-1)
    dt, beta = np.log1p(np.exp(dt + bias)), 1 / (1 + np.exp(-beta))
    state, y = np.zeros((H, N, P)), np.zeros((len(x), H, P))
    for t in range(len(x)):
        for i in range(H):
            of = slice(i // heads * N, (i // heads + 1) * N)
            query, key = (a[t, of] / np.sqrt(np.sum(a[t, of] ** 2) + 1e-6) for a in (q, k))
            state[i] *= np.exp(dt[t, i] * A[i])
            value = v[t, i * P : (i + 1) * P]
            state[i] += beta[t, i] * np.outer(key, value - key @ state[i])
            out = query @ state[i] / np.sqrt(N)
            out *= weight / np.sqrt(np.mean(out**2) + 0.03)
            y[t, i] = out * silu(z[t, i * P : (i + 1) * P])
    want = (y.reshape(len(x), -1) @ out_proj.T).astype(np.float32)
    got, end = fold(layer, x, layer.init_state())
    assert_close(got, want, "float32")
    assert_close(end.ssm, state.astype(np.float32), "float32")
