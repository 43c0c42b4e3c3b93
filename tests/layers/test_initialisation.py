"""New models have the distribution of the official ones: `Mamba.__init__`, `_init_weights`."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx


pytestmark = pytest.mark.usefixtures("compile_fast")


N_LAYER = 9


@pytest.fixture(scope="module")
def model() -> mbx.LanguageModel:
    mixer = mbx.Mamba1Config(d_model=96, d_state=12, bias=True)
    block = mbx.BlockConfig(mixer, mlp=mbx.GatedMLPConfig(160))
    config = mbx.LanguageModelConfig(
        vocab_size=500, layers=(block,) * N_LAYER, tie_embeddings=False, padded_vocab_size=512
    )
    return config.build(key=jr.key(0))


def is_uniform(values: Any, low: float, high: float) -> bool:
    """Tests whether all values are in the range and uniform, by the test of Kolmogorov and Smirnov:
    chance exceeds the critical distance once in a million."""
    sample = np.sort(np.ravel((values - low) / (high - low)))
    n = sample.size
    distance = np.abs(sample - (np.arange(n) + 0.5) / n).max() + 0.5 / n
    return bool(sample[0] >= 0 and sample[-1] <= 1 and distance < np.sqrt(np.log(2e6) / 2 / n))


def test_linear_maps(model: mbx.LanguageModel):
    for i, block in enumerate(model.layers.unstack()):
        mixer, mlp = block.mixer, block.mlp  # pyright: ignore
        scale = N_LAYER**-0.5
        assert is_uniform(mixer.in_proj.weight, -(96**-0.5), 96**-0.5), i
        assert is_uniform(mixer.x_proj.weight, -(192**-0.5), 192**-0.5)
        assert is_uniform(mixer.dt_proj.weight, -(6**-0.5), 6**-0.5)
        assert is_uniform(mixer.out_proj.weight, -scale * 192**-0.5, scale * 192**-0.5)
        assert is_uniform(mixer.conv1d.weight, -0.5, 0.5)
        assert is_uniform(mixer.conv1d.bias, -0.5, 0.5)
        assert is_uniform(mlp.fc1.weight, -(96**-0.5), 96**-0.5)
        assert is_uniform(mlp.fc2.weight, -scale * 160**-0.5, scale * 160**-0.5)
        assert not mixer.in_proj.bias.any()
        assert not mixer.out_proj.bias.any()
    assert model.lm_head is not None
    assert is_uniform(model.lm_head.weight, -(96**-0.5), 96**-0.5)


def test_parameters_of_recurrence(model: mbx.LanguageModel):
    for block in model.layers.unstack():
        mixer = block.mixer  # pyright: ignore
        np.testing.assert_allclose(mixer.A, np.tile(-np.arange(1.0, 13), (192, 1)), rtol=1e-6)
        np.testing.assert_array_equal(mixer.D, np.ones(192))
        dt = np.log(jax.nn.softplus(mixer.dt_bias))
        assert is_uniform(dt, np.log(0.001) - 1e-5, np.log(0.1) + 1e-5)


def test_step_sizes_have_a_floor():
    mixer = mbx.Mamba1(64, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3, key=jr.key(0))
    dt = jax.nn.softplus(mixer.dt_bias)
    np.testing.assert_allclose(dt.min(), 1e-3, rtol=1e-5)
    assert (dt < 1.001e-3).mean() > 0.5
    assert dt.max() > 5e-3


def test_embedding_and_norms(model: mbx.LanguageModel):
    weight = np.asarray(model.embedding.weight)
    assert weight.shape == (512, 96)
    assert abs(weight.mean()) < 4 * 0.02 / np.sqrt(weight.size)
    assert abs(weight.std() - 0.02) < 4 * 0.02 / np.sqrt(2 * weight.size)
    assert abs((np.abs(weight) < 0.02).mean() - 0.6827) < 0.01  # normal, not uniform
    for norm in [model.norm_f, *(block.norm for block in model.layers.unstack())]:  # pyright: ignore
        np.testing.assert_array_equal(norm.weight, 1)
        assert norm.bias is None
        assert norm.eps == 1e-5


def test_layers_differ_and_keys_matter(model: mbx.LanguageModel):
    layers = model.layers.unstack()
    first, second = (jax.tree.leaves(layer) for layer in layers[:2])
    same = [bool((a == b).all()) for a, b in zip(first, second, strict=True)]
    constant = [bool((a == a.ravel()[0]).all()) or a.shape == (192, 12) for a in first]
    assert same == constant


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (jnp.float16, jnp.float32))],
)
def test_dtype(dtype: jnp.dtype):
    block = mbx.BlockConfig(mbx.Mamba1Config(d_model=8), mlp=mbx.GatedMLPConfig(5))
    config = mbx.LanguageModelConfig(vocab_size=9, layers=(block,), tie_embeddings=False)
    model = config.build(dtype=dtype, key=jr.key(0))
    mask = mbx.recurrence_mask(model)
    assert sum(jax.tree.leaves(mask)) == 3
    for leaf, recurrence in zip(jax.tree.leaves(model), jax.tree.leaves(mask), strict=True):
        assert leaf.dtype == (jnp.float32 if recurrence else dtype)


def test_select_norms():
    mixer = mbx.Mamba1(
        64,
        d_state=5,
        select_norm="weighted",
        select_norm_eps=0.1,
        dtype=jnp.bfloat16,
        key=jr.key(0),
    )
    for norm, size in ((mixer.dt_norm, 4), (mixer.B_norm, 5), (mixer.C_norm, 5)):
        assert norm is not None
        assert norm.weight is not None
        assert norm.weight.dtype == jnp.bfloat16
        np.testing.assert_array_equal(norm.weight, np.ones(size))
        assert (norm.bias, norm.eps) == (None, 0.1)


def test_mamba2():
    """Mamba-2 draws one step size and one rate of decay per head, as `Mamba2.__init__`."""
    mixer = mbx.Mamba2(32, d_inner=2048, d_state=8, headdim=2, bias=True, key=jr.key(0))
    assert is_uniform(jnp.exp(mixer.A_log), 1 - 1e-4, 16 + 1e-4)
    np.testing.assert_array_equal(mixer.A, -jnp.exp(mixer.A_log))
    dt = np.log(jax.nn.softplus(mixer.dt_bias))
    assert is_uniform(dt, np.log(0.001) - 1e-5, np.log(0.1) + 1e-5)
    assert abs(np.corrcoef(dt, mixer.A_log)[0, 1]) < 0.15
    np.testing.assert_array_equal(mixer.D, np.ones(1024))
    assert mixer.norm is not None
    np.testing.assert_array_equal(mixer.norm.weight, np.ones(2048))
    assert is_uniform(mixer.in_proj.weight, -(32**-0.5), 32**-0.5)
    assert is_uniform(mixer.out_proj.weight, -(2048**-0.5), 2048**-0.5)
    assert is_uniform(mixer.conv1d.weight, -0.5, 0.5)
    assert is_uniform(mixer.conv1d.bias, -0.5, 0.5)
    assert mixer.in_proj.bias is not None
    assert not mixer.in_proj.bias.any()
    assert mixer.out_proj.bias is not None
    assert not mixer.out_proj.bias.any()

    options: Any = {
        "dt_min": 1e-6,
        "dt_max": 1e-2,
        "dt_init_floor": 1e-3,
        "A_init_range": (2.0, 3.0),
    }
    mixer = mbx.Mamba2(64, headdim=1, residual_scale=0.25, **options, key=jr.key(0))
    np.testing.assert_allclose(jax.nn.softplus(mixer.dt_bias).min(), 1e-3, rtol=1e-5)
    assert is_uniform(jnp.exp(mixer.A_log), 2 - 1e-5, 3 + 1e-5)
    assert is_uniform(mixer.out_proj.weight, -0.25 * 128**-0.5, 0.25 * 128**-0.5)
    mixer = mbx.Mamba2(64, headdim=16, D_has_hdim=True, key=jr.key(0))
    np.testing.assert_array_equal(mixer.D, np.ones((8, 16)))
    for dtype in (jnp.bfloat16, jnp.float32):
        mixer = mbx.Mamba2(8, headdim=4, dtype=dtype, key=jr.key(0))
        mask = mbx.recurrence_mask(mixer)
        assert sum(jax.tree.leaves(mask)) == 3
        for leaf, recurrence in zip(jax.tree.leaves(mixer), jax.tree.leaves(mask), strict=True):
            assert leaf.dtype == (jnp.float32 if recurrence else dtype)


def test_mamba3():
    """Mamba-3 starts from ones, except for step sizes and linear maps, as `Mamba3.__init__`."""
    mixer = mbx.Mamba3(
        32,
        d_inner=2048,
        d_state=8,
        headdim=2,
        mimo_rank=4,
        outproj_norm=True,
        residual_scale=0.25,
        key=jr.key(0),
    )
    dt = np.log(jax.nn.softplus(mixer.dt_bias))
    assert is_uniform(dt, np.log(0.001) - 1e-5, np.log(0.1) + 1e-5)
    assert is_uniform(mixer.in_proj.weight, -(32**-0.5), 32**-0.5)
    assert is_uniform(mixer.out_proj.weight, -0.25 * 2048**-0.5, 0.25 * 2048**-0.5)
    assert mixer.in_proj.bias is None
    assert mixer.out_proj.bias is None
    assert mixer.norm is not None
    ones = (mixer.D, mixer.B_bias, mixer.C_bias, mixer.mimo_z, mixer.norm.weight)
    for leaf in (*ones, mixer.B_norm.weight, mixer.C_norm.weight):
        np.testing.assert_array_equal(leaf, 1)
    for leaf in (mixer.mimo_x, mixer.mimo_o):
        np.testing.assert_array_equal(leaf, 0.25)

    mixer = mbx.Mamba3(
        64,
        headdim=1,
        dt_min=1e-6,
        dt_max=1e-2,
        dt_init_floor=1e-3,
        dtype=jnp.bfloat16,
        key=jr.key(0),
    )
    np.testing.assert_allclose(jax.nn.softplus(mixer.dt_bias).min(), 1e-3, rtol=1e-5)
    assert (mixer.mimo_x, mixer.mimo_z, mixer.mimo_o, mixer.norm) == (None,) * 4
    mask = mbx.recurrence_mask(mixer)
    assert sum(jax.tree.leaves(mask)) == 2
    for leaf, recurrence in zip(jax.tree.leaves(mixer), jax.tree.leaves(mask), strict=True):
        assert leaf.dtype == (jnp.float32 if recurrence else jnp.bfloat16)


def test_gated_delta_net():
    """Step sizes and rates of decay are drawn as by flash-linear-attention."""
    mixer = mbx.GatedDeltaNet(
        32, d_inner=2048, d_state=8, headdim=2, ngroups=4, residual_scale=0.25, key=jr.key(0)
    )
    dt = np.log(jax.nn.softplus(mixer.dt_bias))
    assert is_uniform(dt, np.log(0.001) - 1e-5, np.log(0.1) + 1e-5)
    assert is_uniform(-mixer.A, 0.01 - 1e-5, 16 + 1e-4)
    assert is_uniform(mixer.in_proj.weight, -(32**-0.5), 32**-0.5)
    assert is_uniform(mixer.conv1d.weight, -0.5, 0.5)
    assert is_uniform(mixer.out_proj.weight, -0.25 * 2048**-0.5, 0.25 * 2048**-0.5)
    np.testing.assert_array_equal(mixer.norm.weight, 1)
    half = mbx.GatedDeltaNet(4, headdim=2, dtype=jnp.bfloat16, key=jr.key(0))
    mask = mbx.recurrence_mask(half)
    assert sum(jax.tree.leaves(mask)) == 2
    for leaf, recurrence in zip(jax.tree.leaves(half), jax.tree.leaves(mask), strict=True):
        assert leaf.dtype == (jnp.float32 if recurrence else jnp.bfloat16)
