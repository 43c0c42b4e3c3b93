"""Layers that are cut over the devices of a mesh."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.cases import assert_close, quick
from tests.support.collectives import collectives
from tests.support.devices import VOCAB, batch, mesh, train, waves


pytestmark = pytest.mark.usefixtures("compile_fast")
eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="test_on_eight_devices runs this")
SEQ = 40
KEY = jr.key(0)
LAYERS = {
    "mamba1": lambda: mbx.Mamba1(6, d_state=3, bias=True, select_norm="weighted", key=KEY),
    "mamba2": lambda: mbx.Mamba2(8, d_state=3, headdim=2, bias=True, key=KEY),
    "mamba2_groups": lambda: mbx.Mamba2(
        8, d_state=3, headdim=2, ngroups=4, D_has_hdim=True, norm_before_gate=True, key=KEY
    ),
    "mamba3": lambda: mbx.Mamba3(8, d_state=4, headdim=2, outproj_norm=True, key=KEY),
    "mamba3_mimo": lambda: mbx.Mamba3(8, d_state=4, headdim=2, ngroups=4, mimo_rank=2, key=KEY),
    "attention": lambda: mbx.Attention(
        8, nheads=4, headdim=6, nheads_kv=4, d_conv=3, rotary_emb_dim=4, qkv_proj_bias=True, key=KEY
    ),
    "attention_one_kv": lambda: mbx.Attention(
        8, nheads=8, headdim=4, nheads_kv=1, window=7, out_proj_bias=True, key=KEY
    ),
}


def arrays(tree: Any) -> Any:
    return jax.device_get(eqx.filter(tree, eqx.is_inexact_array))


@eight
@pytest.mark.parametrize("name", list(LAYERS))
def test_cut_layers_compute_the_same(name: str):
    """Outputs, and all gradients, of `scan` from a state, and of `step` after it."""
    layer = LAYERS[name]()
    cut = mbx.tensor_parallel(layer, mesh(tensor=4))
    xs = jr.normal(jr.key(1), (2, SEQ, layer.d_model))
    reset, length = jnp.arange(SEQ) == 9, jnp.int32(33)

    def results(inputs: Any) -> Any:
        layer, xs = inputs
        y0, state = layer.scan(xs[0], layer.init_state(max_len=100))
        y1, state = layer.scan(xs[1], state, reset=reset, length=length)
        y2, state = layer.step(xs[0, 0], state)
        y3, _ = layer.step(xs[0, 1], state)
        found = layer(xs[1]), y0, y1[:33], y2, y3
        return waves(found), found

    def run(layer: Any) -> Any:
        gradient = eqx.filter_value_and_grad(results, has_aux=True)
        (_, found), (of_layer, of_xs) = quick(lambda *inputs: gradient(inputs))(layer, xs)
        return found, mbx.sharding.gathered(of_layer), of_xs

    assert_close(arrays(run(cut)), arrays(run(layer)), "float32")
    assert eqx.tree_equal(arrays(mbx.sharding.gathered(cut)), arrays(layer))


def model(*, stacked: bool = False, **options: Any) -> Any:
    mlp = mbx.GatedMLPConfig(8)
    mixers = mbx.Mamba2Config(8, d_state=4, headdim=4), mbx.AttentionConfig(8, nheads=4)
    blocks = (mbx.BlockConfig(mixers[0], mlp), mbx.BlockConfig(mixers[not stacked], mlp))
    config = mbx.LanguageModelConfig(VOCAB, blocks, tie_embeddings=False)
    return config.build(stacked=stacked, key=KEY, **options)


@eight
@pytest.mark.parametrize("stacked", [False, True])
def test_training_is_that_of_one_device(stacked: bool):
    """With rows along other axes of the mesh, and matrices cut twice."""
    devices = mesh(data=2, fsdp=2, tensor=2)
    step = training.TrainStep(optax.sgd(0.1))
    want = train(step, step.init(model(stacked=stacked), key=KEY), batch())
    cut = mbx.tensor_parallel(model(stacked=stacked), devices)
    weights = [leaf for leaf in jax.tree.leaves(cut) if "tensor" in leaf.sharding.spec]
    assert all("fsdp" in leaf.sharding.spec for leaf in weights if leaf.ndim > 1 + stacked)
    assert len(weights) == (7 if stacked else 14)
    state = step.init(cut, key=KEY)
    got, metrics = train(step, state, mbx.shard_rows(batch(), devices))
    got = mbx.sharding.gathered(got)
    for a, b in zip(jax.tree.leaves((got, metrics)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * max(1, np.abs(b).max()))


@eight
@pytest.mark.parametrize("name", list(LAYERS))
def test_only_sums_are_exchanged(name: str):
    """All collectives are sums outside of loops. Those as large as the input are the sum of the
    outputs and the sum of the input's gradient, and for Mamba-1 what its step sizes come from, and
    its gradient."""
    layer = LAYERS[name]()
    cut = mbx.tensor_parallel(layer, mesh(tensor=4))
    x = jnp.zeros((256, layer.d_model))
    loss = lambda given: jnp.sum(given[0](given[1]) ** 2)
    for run, large in ((loss, 1), (eqx.filter_grad(loss), 2)):
        compiled: Any = eqx.filter_jit(run)
        text = compiled.lower((cut, x)).compile().compiled.as_text()
        found = collectives(str(text))
        assert {(each.kind, each.loops) for each in found} == {("all-reduce", 0)}
        assert sum(each.bytes >= x.nbytes for each in found) == large * (1 + (name == "mamba1"))


@eight
@pytest.mark.parametrize("name", ["mamba1", "mamba2", "mamba3", "attention"])
def test_half_precision(name: str):
    """In a mesh of several axes, where XLA's CPU backend cannot sum 16-bit numbers."""
    layer = mbx.cast(LAYERS[name](), jnp.bfloat16)
    cut = mbx.tensor_parallel(layer, mesh(data=2, tensor=4))
    x = jr.normal(jr.key(1), (SEQ, layer.d_model), jnp.bfloat16)
    loss = lambda given: jnp.sum(given[0](given[1]).astype(jnp.float32) ** 2)
    gradient = quick(lambda *given: eqx.filter_value_and_grad(loss)(given))
    got, want = (jax.tree.leaves(gradient(each, x)) for each in (cut, layer))
    assert abs(got[0] - want[0]) < 0.02 * abs(want[0])
    for leaf in got:
        assert jnp.isfinite(leaf).all()
        assert jnp.abs(leaf).max() > 0


@eight
@pytest.mark.parametrize("kind", [mbx.GatedMLP, mbx.layers.MLP])
def test_cut_mlps_compute_the_same(kind: Any):
    layer = kind(6, 8, bias=True, key=KEY)
    layer = jax.tree.map(lambda leaf: leaf + 0.1, layer)  # Biases begin as zeros.
    cut = mbx.tensor_parallel(layer, mesh(tensor=4))
    x = jr.normal(jr.key(1), (SEQ, 6))

    def run(layer: Any) -> Any:
        gradient = eqx.filter_grad(lambda given: waves(given[0](given[1])))
        of_layer, of_x = quick(lambda *given: gradient(given))(layer, x)
        return layer(x), mbx.sharding.gathered(of_layer), of_x

    assert_close(arrays(run(cut)), arrays(run(layer)), "float32")


@eight
def test_shard_keeps_what_is_cut():
    devices = mesh(fsdp=2, tensor=4)
    step = training.TrainStep(optax.adam(1e-3))
    cut = mbx.tensor_parallel(
        mbx.BlockConfig(mbx.Mamba2Config(8, headdim=2)).build(key=KEY), devices
    )
    before = step.init(cut, key=KEY)
    after = mbx.shard(before, devices)
    is_cut = lambda leaf: eqx.is_array(leaf) and "tensor" in getattr(leaf.sharding, "spec", ())
    leaves = [leaf for leaf in jax.tree.leaves(after) if is_cut(leaf)]
    assert len(leaves) == 3 * 4  # The parameters, and Adam's two means.
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not is_cut(old) or old.sharding == new.sharding


@eight
def test_generates():
    """Greedy tokens of ragged prompts are those of one device."""
    made = model()
    cut = mbx.tensor_parallel(made, mesh(tensor=4))
    prompts, greedy = [[1, 2, 3], [4, 5, 6, 7, 8]], mbx.Sampling(temperature=0.0)
    tokens = [mbx.generate(each, prompts, 6, greedy).tokens for each in (cut, made)]
    np.testing.assert_array_equal(tokens[0], tokens[1])


@eight
@pytest.mark.usefixtures("as_users_run")
def test_refuses_what_cannot_be_cut():
    layer = LAYERS["mamba2"]()
    with pytest.raises(ValueError, match=r"must have an axis 'tensor', but got the axes \('data'"):
        mbx.tensor_parallel(layer, mesh(data=2))
    with pytest.raises(
        ValueError, match="must divide `nheads` of `Mamba2`, but got 3 devices and n"
    ):
        mbx.tensor_parallel(layer, mesh(tensor=3))
    with pytest.raises(ValueError, match="`ngroups` of `Mamba2`, but got 8 devices and ngroups=4"):
        mbx.tensor_parallel(LAYERS["mamba2_groups"](), mesh(tensor=8))
    small = mbx.quantize(mbx.Mamba1(64, key=KEY))
    with pytest.raises(ValueError, match="`in_proj` of `Mamba1` must be a `Linear`"):
        mbx.tensor_parallel(small, mesh(tensor=2))
    with pytest.raises(ValueError, match="d_ssm=8 and d_inner=16"):
        mbx.tensor_parallel(mbx.Mamba2(8, d_ssm=8, headdim=4, key=KEY), mesh(tensor=2))
    cut = mbx.tensor_parallel(mbx.Mamba1(64, key=KEY), mesh(tensor=2))
    with pytest.raises(ValueError, match=r"`in_proj.linears` of `Mamba1` must be a `Linear`"):
        mbx.quantize(cut)(jnp.zeros((3, 64)))
    with pytest.raises(
        ValueError, match=r"'fsdp' must divide axis 1 of `in_proj.linears.0.weight`"
    ):
        mbx.tensor_parallel(mbx.Mamba1(6, key=KEY), mesh(fsdp=4, tensor=2))
    state = LAYERS["mamba2"]().init_state()
    cut = mbx.tensor_parallel(LAYERS["mamba2"](), mesh(tensor=2))
    with pytest.raises(
        ValueError, match=r"given to `TensorParallel` must be .* \(3, 28\), but got"
    ):
        cut.step(jnp.zeros(8), state)
    with pytest.raises(ValueError, match="but has none of `Mamba1`"):
        mbx.tensor_parallel(mbx.CausalConv1d(4, key=KEY), mesh(tensor=2))
