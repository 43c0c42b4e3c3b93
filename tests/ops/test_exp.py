"""The exponential of the scans, against float64."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np

from mamba_eqx.ops._exp import exp


def test_exp_has_the_accuracy_of_float32_wherever_the_result_is_normal():
    z = np.concatenate([np.linspace(-87.3, 88.3, 400_001), -np.geomspace(1e-30, 1, 100_001)])
    z = z.astype(np.float32)
    found = np.asarray(jax.jit(exp)(z), np.float64)
    np.testing.assert_allclose(found, np.exp(z.astype(np.float64)), rtol=2.5e-7)


def test_exp_of_special_values():
    z = jnp.asarray([0, -0.0, -jnp.inf, -1e30, -104, jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(exp(z), [1, 1, 0, 0, 0, np.inf, np.nan])
    ends = exp(jnp.asarray([127.49 * np.log(2), 127.51 * np.log(2)], jnp.float32))
    np.testing.assert_array_equal(jnp.isinf(ends), [False, True])
    below_normal = exp(jnp.linspace(-104, -87.3, 10_001, dtype=jnp.float32))
    assert jnp.all((below_normal >= 0) & (below_normal <= 1.3e-38))


def test_derivatives_of_exp_are_exp():
    z = jnp.asarray([-50, -3, -0.4, 0, 1.5], jnp.float32)
    for derivative in (jax.grad(exp), jax.grad(jax.grad(exp)), jax.jacfwd(jax.grad(exp))):
        np.testing.assert_array_equal(jax.vmap(derivative)(z), exp(z))


def test_exp_computes_other_dtypes_as_jax_does():
    for dtype in (jnp.bfloat16, jnp.float16):
        z = jnp.linspace(-5, 1, 101, dtype=dtype)
        np.testing.assert_array_equal(exp(z), jnp.exp(z))
