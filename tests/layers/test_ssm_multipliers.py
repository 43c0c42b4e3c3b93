"""`ssm_multipliers` of Mamba-2: the same layer without them, with multiplied rows of `in_proj`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx


pytestmark = pytest.mark.usefixtures("compile_fast")

MULTIPLIERS = (0.5, 2.0, 0.25, 4.0, 8.0)


def make(ssm_multipliers: tuple[float, ...]) -> mbx.Mamba2:
    """Makes a layer with two groups of three heads, and four channels of the MLP."""
    return mbx.Mamba2(
        5,
        d_inner=16,
        d_ssm=12,
        headdim=2,
        ngroups=2,
        d_state=3,
        bias=True,
        ssm_multipliers=ssm_multipliers,
        key=jr.key(0),
    )


def test_multipliers_multiply_parts_of_projection():
    layer = eqx.tree_at(lambda m: m.in_proj.bias, make(MULTIPLIERS), jr.normal(jr.key(1), (50,)))
    rows = np.repeat((1.0, *MULTIPLIERS), (8, 12, 12, 6, 6, 6)).astype(np.float32)
    plain = eqx.tree_at(
        lambda m: [m.in_proj.weight, m.in_proj.bias],
        make((1.0,) * 5),
        [layer.in_proj.weight * rows[:, None], layer.in_proj.bias * rows],
    )
    x = jr.normal(jr.key(2), (7, 5))
    # The multipliers are powers of two, so multiplying before or after rounding is the same.
    np.testing.assert_array_equal(layer(x), plain(x))
    state = layer.init_state()
    np.testing.assert_array_equal(layer.step(x[0], state)[0], plain.step(x[0], state)[0])


def test_multipliers_of_one_add_no_operation():
    x = jnp.ones((3, 5))
    with_default = mbx.Mamba2(5, headdim=2, key=jr.key(0))
    with_ones = mbx.Mamba2(5, headdim=2, ssm_multipliers=(1.0,) * 5, key=jr.key(0))
    assert eqx.tree_equal(with_default, with_ones)
    count = lambda layer: str(jax.make_jaxpr(layer)(x)).count(" mul ")
    doubled = mbx.Mamba2(5, headdim=2, ssm_multipliers=(2.0,) * 5, key=jr.key(0))
    assert count(doubled) == count(with_ones) + 1
