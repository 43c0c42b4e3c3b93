"""Rules that place models, training states and batches on devices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.devices import ROWS, VOCAB, batch, mesh, train


pytestmark = pytest.mark.usefixtures("compile_fast")
eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="test_on_eight_devices runs this")
EXPERTS = mbx.MixtureOfExpertsConfig(8, n_experts=4, top_k=2)
BLOCK = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))
MIXERS = (
    mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4), mbx.GatedMLPConfig(8)),
    mbx.BlockConfig(mbx.Mamba2Config(8, d_state=4, headdim=4), EXPERTS),
    mbx.BlockConfig(mbx.AttentionConfig(8, nheads=2), mbx.MLPConfig(8)),
)


def model() -> Any:
    config = mbx.LanguageModelConfig(VOCAB, MIXERS, tie_embeddings=False)
    return config.build(key=jr.key(0))


def test_every_matrix_is_cut():
    """The rules know all weight matrices, also stacked ones, and cut the axis of the residual."""
    place = mbx.sharding.shardings(AbstractMesh((2,), ("fsdp",)))
    for stacked in (False, True):
        config = mbx.LanguageModelConfig(VOCAB, MIXERS[:1] * 2, tie_embeddings=False)
        made = config.build(stacked=stacked, key=jr.key(0)) if stacked else model()
        cut = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(made):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if eqx.is_array(leaf) and name.split(".")[-1] in ("weight", "fc1", "fc2"):
                large = leaf.ndim > 1 + stacked and "conv1d" not in name and "router" not in name
                spec = place(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)).spec
                large = large or name in ("embedding.weight", "lm_head.weight")
                assert ("fsdp" in spec) == large, name
                if large:
                    where = list(spec).index("fsdp")
                    assert leaf.shape[where] in (8, 16)
                    cut += 1
        assert cut >= 8


def test_refuses_a_mesh_that_does_not_divide():
    place = mbx.sharding.shardings(AbstractMesh((3,), ("fsdp",)))
    leaf = jax.ShapeDtypeStruct((40, 8), jnp.float32)
    with pytest.raises(
        ValueError, match=r"'fsdp' must divide axis 1 of `mixer.in_proj.weight`, but "
    ):
        place("mixer.in_proj.weight", leaf)
    assert place("mixer.D", leaf).spec == P()
    with pytest.raises(ValueError, match="must have an axis 'data' or 'fsdp' for the rows"):
        mbx.shard_rows(jnp.zeros(4), mesh(context=1))


@eight
def test_training_is_that_of_one_device():
    """With a carry and an average, whose leaves follow the rules too."""
    devices = mesh(data=2, fsdp=4)
    step = training.TrainStep(optax.adam(1e-2), average_decay=0.9)
    config = mbx.LanguageModelConfig(VOCAB, MIXERS[:1], tie_embeddings=False)
    make = lambda: step.init(config.build(key=jr.key(0)), rows=ROWS, key=jr.key(0))
    want = train(step, make(), batch())
    state: Any = mbx.shard(make(), devices)
    weight = state.opt_state[0].mu.layers.layers[0].mixer.in_proj.weight
    assert weight.sharding.spec == P(None, "fsdp")
    assert state.carry[0].ssm.sharding.spec == P(("data", "fsdp"))
    got = train(step, state, mbx.shard_rows(batch(), devices))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Adam divides by roots of tiny numbers, which magnifies their rounding.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, np.abs(b).max()))


@eight
def test_loads_and_generates(tmp_path):
    devices = mesh(data=2, fsdp=4)
    mbx.save_pretrained(mbx.LanguageModelConfig(VOCAB, (BLOCK,)).build(key=jr.key(0)), tmp_path)
    want = mbx.from_pretrained(tmp_path)
    got = mbx.from_pretrained(tmp_path, sharding=mbx.sharding.shardings(devices))
    assert got.embedding.weight.sharding == NamedSharding(devices, P(None, "fsdp"))
    assert eqx.tree_equal(jax.device_get(got), jax.device_get(want))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    sampling = mbx.Sampling(temperature=0.0)
    tokens = [mbx.generate(m, prompts, 6, sampling).tokens for m in (got, want)]
    np.testing.assert_array_equal(tokens[0], tokens[1])


@eight
def test_places_nothing_if_one_array_does_not_fit():
    made = model()
    before = [leaf.sharding for leaf in jax.tree.leaves(eqx.filter(made, eqx.is_array))]
    with pytest.raises(ValueError, match="must divide"):
        mbx.shard(made, mesh(fsdp=8), (("lm_head.weight", ("fsdp", None)),))
    with pytest.raises(ValueError, match="must divide the rows"):
        mbx.shard_rows({"a": jnp.zeros((8, 2)), "b": jnp.zeros((7, 2))}, mesh(data=8))
    assert before == [leaf.sharding for leaf in jax.tree.leaves(eqx.filter(made, eqx.is_array))]


@eight
def test_sums_of_an_optimiser_are_not_cut():
    """Adafactor keeps sums over an axis of a parameter under the parameter's path."""
    config = mbx.LanguageModelConfig(VOCAB, (BLOCK,) * 3)
    step = training.TrainStep(optax.adafactor(1e-3, min_dim_size_to_factor=4))
    state = step.init(config.build(stacked=True, key=jr.key(0)), key=jr.key(1))
    state = mbx.shard(state, mesh(fsdp=2))
    state, _ = step(state, mbx.shard_rows(batch(), mesh(fsdp=2)))
    assert state.model.embedding.weight.sharding.spec == P(None, "fsdp")
