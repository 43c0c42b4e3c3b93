"""Agreement of Gated DeltaNet with the layer of transformers' Qwen3-Next, in float64."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx


pytestmark = [pytest.mark.slow, pytest.mark.parity]

NGROUPS, HEADS, D_STATE, HEADDIM = 2, 3, 5, 4


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def make_theirs(torch: Any) -> Any:
    """Makes the layer of transformers, with random weights."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = qwen.Qwen3NextConfig(
        hidden_size=6,
        linear_num_key_heads=NGROUPS,
        linear_num_value_heads=NGROUPS * HEADS,
        linear_key_head_dim=D_STATE,
        linear_value_head_dim=HEADDIM,
        linear_conv_kernel_dim=3,
        rms_norm_eps=0.02,
        num_hidden_layers=4,
    )
    torch.manual_seed(0)
    layer = qwen.Qwen3NextGatedDeltaNet(config, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def rows_by_head() -> np.ndarray:
    """Returns, for each output of our `in_proj`, its row in transformers' two projections."""
    keys, values = D_STATE, HEADS * HEADDIM
    qkvz, end = [], NGROUPS * 2 * (keys + values)
    sizes = [keys, keys, values, values]
    for part, size in enumerate(sizes):
        for group in range(NGROUPS):
            start = group * sum(sizes) + sum(sizes[:part])
            qkvz += range(start, start + size)
    ba = [
        end + g * 2 * HEADS + p * HEADS + h
        for p in (0, 1)
        for g in range(NGROUPS)
        for h in range(HEADS)
    ]
    return np.array(qkvz + ba)


def make_ours(theirs: Any) -> mbx.GatedDeltaNet:
    """Makes our layer, with the same weights."""
    ours = mbx.GatedDeltaNet(
        6,
        d_inner=NGROUPS * HEADS * HEADDIM,
        d_state=D_STATE,
        d_conv=3,
        headdim=HEADDIM,
        ngroups=NGROUPS,
        norm_eps=0.02,
        key=jr.key(0),
    )
    w = {name: parameter.detach().numpy() for name, parameter in theirs.named_parameters()}
    in_proj = np.concatenate([w["in_proj_qkvz.weight"], w["in_proj_ba.weight"]])[rows_by_head()]
    return eqx.tree_at(
        lambda m: (
            m.in_proj.weight,
            m.conv1d.weight,
            m.dt_bias,
            m.A_log,
            m.norm.weight,
            m.out_proj.weight,
        ),
        ours,
        tuple(
            jnp.asarray(value)
            for value in (
                in_proj,
                w["conv1d.weight"][:, 0].T,
                w["dt_bias"],
                w["A_log"],
                w["norm.weight"],
                w["out_proj.weight"],
            )
        ),
    )


def test_outputs_and_gradients(torch: Any, monkeypatch: pytest.MonkeyPatch):
    # transformers would compute the recurrence in float32, whatever the dtype of its weights.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    theirs = make_theirs(torch)
    ours = make_ours(theirs)
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 70, 6))
    x_torch = torch.tensor(x[None], requires_grad=True)
    want = theirs(x_torch)
    (want * torch.tensor(weight)).sum().backward()

    def loss(ours: mbx.GatedDeltaNet, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = ours(x)
        return jnp.sum(y * weight), y

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (grads, x_bar) = grad(ours, jnp.asarray(x))

    def assert_close(got: Any, want: Any) -> None:
        want = want.detach().numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * max(1, np.abs(want).max()))

    assert_close(y, want[0])
    assert_close(x_bar, x_torch.grad[0])
    assert_close(grads.out_proj.weight, theirs.out_proj.weight.grad)
    assert_close(grads.norm.weight, theirs.norm.weight.grad)
    assert_close(grads.A_log, theirs.A_log.grad)
    assert_close(grads.dt_bias, theirs.dt_bias.grad)
    assert_close(grads.conv1d.weight, theirs.conv1d.weight.grad[:, 0].T)
    rows = torch.cat([theirs.in_proj_qkvz.weight.grad, theirs.in_proj_ba.weight.grad])
    assert_close(grads.in_proj.weight, rows[rows_by_head()])
