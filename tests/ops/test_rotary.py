"""The rotation of pairs of features, which Mamba-3 and attention share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_eqx.ops._rotary import rotate


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("features", "pairs"), [(8, 4), (8, 2), (7, 3), (5, 1), (4, 0)])
def test_rotates_pairs_like_complex_numbers(features: int, pairs: int, interleaved: bool):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((3, 2, features))
        angle = rng.standard_normal((3, 1, pairs))
        want = x.copy()
        for i in range(pairs):
            j, k = (2 * i, 2 * i + 1) if interleaved else (i, i + features // 2)
            rotated = (x[..., j] + 1j * x[..., k]) * np.exp(1j * angle[..., i])
            want[..., j], want[..., k] = rotated.real, rotated.imag
        cos, sin = jnp.cos(jnp.asarray(angle)), jnp.sin(jnp.asarray(angle))
        got = rotate(jnp.asarray(x), cos, sin, interleaved=interleaved)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-15)


def test_leading_axes_broadcast():
    x, cos, sin = jnp.ones((3, 1, 4)), jnp.zeros((2, 2)), jnp.ones((2, 2))
    assert rotate(x, cos, sin, interleaved=True).shape == (3, 2, 4)


def test_too_many_angles_raise():
    with pytest.raises(ValueError, match="3 angles rotate 6 features, but the array has 5"):
        rotate(jnp.ones(5), jnp.ones(3), jnp.ones(3), interleaved=True)
