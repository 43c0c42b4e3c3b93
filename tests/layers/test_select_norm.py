"""Mamba-1's norms of `dt`, `B` and `C`: weighted norms against weightless ones, which the parity
tests compare with transformers."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import mamba_eqx as mbx
from tests.support.cases import assert_close, scan
from tests.support.registry import SIZES, make_inputs, make_layer


def test_weights_equal_scaled_projections():
    """The weight of `dt_norm` equals a scaled `dt_proj`. The weight of `B_norm` scales the state,
    and the inverse weight of `C_norm` undoes the scaling in the output."""
    s = SIZES[0]
    weighted = make_layer("mamba1_normed", s, "float32", 0)
    assert isinstance(weighted, mbx.Mamba1)
    of_dt, of_B = np.linspace(0.5, 1.5, s.dt_rank), np.linspace(-2.0, 3.0, s.d_state)
    norms = lambda layer: (layer.dt_norm, layer.B_norm, layer.C_norm)
    weights = lambda layer: [norm.weight for norm in norms(layer)]
    weighted = eqx.tree_at(weights, weighted, [*map(jnp.float32, (of_dt, of_B, 1 / of_B))])
    without = [
        eqx.nn.RMSNorm(norm.shape, norm.eps, use_weight=False, use_bias=False)
        for norm in norms(weighted)
    ]
    plain = eqx.tree_at(norms, weighted, without)
    plain = eqx.tree_at(lambda m: m.dt_proj.weight, plain, weighted.dt_proj.weight * of_dt)
    x = make_inputs("mamba1", s, 9, "float32", 0)
    y, state = scan(weighted, x, weighted.init_state())
    want_y, want_state = scan(plain, x, plain.init_state())
    assert_close(y, want_y, "float32")
    assert_close(state.ssm, want_state.ssm * jnp.float32(of_B)[:, None], "float32")
