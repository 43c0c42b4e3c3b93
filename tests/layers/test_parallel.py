"""`Parallel`: the sum of layers, errors, and generation with caches inside of its state."""

import re
from typing import Any

import jax
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.generation import naive, row


pytestmark = pytest.mark.usefixtures("compile_fast")

MAMBA2 = mbx.Mamba2(4, headdim=4, d_state=3, key=jr.key(0))
ATTENTION = mbx.Attention(4, nheads=2, rotary_emb_dim=2, key=jr.key(1))
X = jr.normal(jr.key(2), (6, 4))


@pytest.mark.slow
def test_parallel_adds_scaled_outputs():
    layer = mbx.Parallel([MAMBA2, ATTENTION, MAMBA2], scales=(0.25, 3.0, 1.0))
    y, state = layer.scan(X, layer.init_state(max_len=9))
    want = 1.25 * MAMBA2(X) + 3 * ATTENTION(X)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    assert [type(part) for part in state] == [mbx.Mamba2State, mbx.KVCache, mbx.Mamba2State]
    plain = mbx.Parallel([MAMBA2, ATTENTION])
    np.testing.assert_array_equal(plain(X), MAMBA2(X) + ATTENTION(X))


@pytest.mark.usefixtures("as_users_run")
def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="`layers` of `Parallel` must be one or more"):
        mbx.Parallel([])
    with pytest.raises(ValueError, match=r"`layers` of.*share `d_model`, but got.*\[4, 6\]"):
        mbx.Parallel([MAMBA2, mbx.Mamba1(6, key=jr.key(0))])
    both = mbx.Mamba1Config(4), mbx.AttentionConfig(4, nheads=1)
    wrong: Any = [MAMBA2, both[1]]
    with pytest.raises(ValueError, match=r"`layers\[1\]` must be a layer.*AttentionConfig.*build"):
        mbx.Parallel(wrong)
    for wrong in ((1.0,), (1.0, 0.0), (1.0, float("nan")), (1.0, "1"), 2.0):
        message = "`scales` must be a tuple of 2 positive numbers, one for each of the `{}`, but "
        got = re.escape(f"got scales={wrong!r}.")
        with pytest.raises(ValueError, match=message.format("layers") + got):
            mbx.Parallel([MAMBA2, ATTENTION], scales=wrong)
        with pytest.raises(ValueError, match=message.format("mixers") + got):
            mbx.ParallelConfig(both, scales=wrong)
    with pytest.raises(ValueError, match=r"`mixers` of.*must share.*d_model=\[4, 3\]"):
        mbx.ParallelConfig((mbx.Mamba1Config(4), mbx.Mamba1Config(3)))
    with pytest.raises(ValueError, match="`mixers` of `Parallel` must be one or more"):
        mbx.ParallelConfig(())
    for wrong in ([*both], (MAMBA2,), both[0]):
        with pytest.raises(ValueError, match="`mixers` must be a tuple of configs of mixers"):
            mbx.ParallelConfig(wrong)
    layer = mbx.Parallel([MAMBA2, ATTENTION])
    with pytest.raises(ValueError, match="maximum number of tokens"):
        layer.init_state()
    state = layer.init_state(max_len=3)
    for wrong in (state[:1], [*state], state[0]):
        with pytest.raises(ValueError, match=r"`Parallel` with 2 layers must be a tuple of 2 st"):
            layer.step(X[0], wrong)
    with pytest.raises(ValueError, match=r"given to `Mamba2` must be a Mamba2State.*KVCache"):
        layer.scan(X, state[::-1])
    with pytest.raises(ValueError, match=r"`Parallel.scan` takes one sequence.*\(1, 6, 4\)"):
        layer(X[None])


def test_config_of_parts_is_checked():
    with pytest.raises(ValueError, match="no config for a mixer of type CausalConv1d"):
        mbx.ParallelConfig.of(mbx.Parallel([mbx.CausalConv1d(4, key=jr.key(0))]))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_parallel_generates(stacked: bool):
    """Ragged prompts, continued from the returned state, whose caches are full."""
    rotary = mbx.AttentionConfig(6, nheads=4, nheads_kv=2, headdim=4, rotary_emb_dim=2)
    mixer = mbx.ParallelConfig((mbx.Mamba2Config(6, headdim=4, d_state=4), rotary))
    config = mbx.LanguageModelConfig(11, (mbx.BlockConfig(mixer),) * 2)
    model = jax.tree.map(lambda leaf: 3 * leaf, config.build(key=jr.key(0), stacked=stacked))
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8]]
    first = mbx.generate(model, prompts, 4)
    second = mbx.generate(model, [[], [9]], 14, state=first.state)
    for i, added in enumerate([[], [9]]):
        tokens, _ = naive(model, prompts[i], 4)
        assert row(first, i) == tokens
        tokens, _ = naive(model, prompts[i] + tokens + added, 14)
        assert row(second, i) == tokens
