"""The summary of a model counts what the model holds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx


MAMBA = mbx.BlockConfig(mbx.Mamba1Config(16, d_state=4))
ATTENTION = mbx.BlockConfig(mbx.AttentionConfig(16, nheads=2))
HYBRID = mbx.LanguageModelConfig(32, layers=(MAMBA, MAMBA, ATTENTION))


pytestmark = pytest.mark.usefixtures("compile_fast")


def build(config, *, stacked=False):
    """Builds a model of ones, which needs no compilation."""
    shapes = eqx.filter_eval_shape(lambda: config.build(stacked=stacked, key=jr.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(np.ones(leaf.shape, leaf.dtype)), shapes)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_totals_are_those_of_the_arrays(dtype):
    model = mbx.cast(build(HYBRID), dtype)
    found = mbx.summary(model)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert found.bytes == size(model)
    for tokens in (1, 7):
        state = size(model.init_state(max_len=tokens))
        assert found.state_bytes + tokens * found.state_bytes_per_token == state


def test_equal_layers_are_one_row():
    found = {part.path: part for part in mbx.summary(build(HYBRID)).parts}
    run, alone = found["layers.layers.0-1"], found["layers.layers.2"]
    assert (run.kind, run.count, alone.count) == ("Block", 2, 1)
    assert run.parameters + alone.parameters == found["layers"].parameters
    mixer = found["layers.layers.0-1.mixer"]
    assert (mixer.kind, mixer.shapes["A_log"]) == ("Mamba1", (32, 4))
    assert mixer.state_bytes == 2 * 4 * 32 * (3 + 4)
    assert found[""].parameters == sum(
        found[name].parameters for name in ("embedding", "layers", "norm_f")
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_shapes_are_summarised_as_arrays_are(stacked):
    config = mbx.LanguageModelConfig(32, layers=(MAMBA,) * 3)
    model = build(config, stacked=stacked)
    found = mbx.summary(model)
    assert mbx.summary(eqx.filter_eval_shape(lambda: model)) == found
    assert found.state_bytes == size(model.init_state())
    assert found.parts[0].state_bytes == found.state_bytes
    inside = [part.state_bytes for part in found.parts if part.kind == "Mamba1"]
    assert inside == [None if stacked else found.state_bytes]


def test_quantized_weights_count_once():
    block = mbx.BlockConfig(mbx.Mamba1Config(32, dt_rank=32))
    model = build(mbx.LanguageModelConfig(32, layers=(block,), tie_embeddings=False))
    narrow = eqx.filter_eval_shape(lambda model: mbx.quantize(model, bits=4, group=32), model)
    assert mbx.summary(narrow).parameters == mbx.summary(model).parameters
    assert mbx.summary(narrow).bytes == size(narrow) < size(model)


def test_depth_limits_the_parts():
    model = build(HYBRID)
    assert [part.path for part in mbx.summary(model, depth=1).parts] == [""]
    assert mbx.summary(model, depth=1).bytes == mbx.summary(model).bytes
    with pytest.raises(ValueError, match="`depth` must be an integer of at least 1"):
        mbx.summary(model, depth=0)


def test_table_has_a_line_for_every_part():
    found = mbx.summary(build(HYBRID))
    lines = str(found).splitlines()
    assert lines[0].split() == ["part", "kind", "shapes", "parameters", "bytes", "state", "bytes"]
    assert len(lines) == len(found.parts) + 5
    assert "2 x Mamba1" in str(found)
    assert lines[-1].endswith("for each token")


def test_module_without_a_state():
    found = mbx.summary(eqx.filter_eval_shape(lambda: eqx.nn.MLP(3, 2, 5, 1, key=jr.key(0))))
    assert (found.parameters, found.state_bytes, found.parts[0].state_bytes) == (32, 0, None)
