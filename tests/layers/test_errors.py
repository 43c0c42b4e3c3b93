"""Error messages name the argument, the values and the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import ops


pytestmark = pytest.mark.usefixtures("as_users_run", "compile_fast")
key = jr.key(0)


@pytest.fixture(scope="module")
def layer() -> mbx.Mamba1:
    return mbx.Mamba1(6, d_state=3, key=key)


@pytest.fixture(scope="module")
def model() -> mbx.LanguageModel:
    return mbx.LanguageModel(mbx.Unrolled([mbx.Mamba1(6, key=key)]), vocab_size=9, key=key)


def test_wrong_input_shapes_raise(layer: mbx.Mamba1):
    with pytest.raises(ValueError, match=r"one sequence.*\(seq, 6\).*batch.*\(2, 4, 6\).*jax.vmap"):
        layer(jnp.zeros((2, 4, 6)))
    with pytest.raises(ValueError, match=r"\(seq, 6\).*\(6,\).*layer.step"):
        layer(jnp.zeros(6))
    with pytest.raises(ValueError, match=r"must be d_model=6.*\(4, 5\)"):
        layer(jnp.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"one token of shape \(6,\).*\(4, 6\).*layer.scan"):
        layer.step(jnp.zeros((4, 6)), layer.init_state())
    with pytest.raises(ValueError, match=r"d_model=6.*\(5,\)"):
        layer.step(jnp.zeros(5), layer.init_state())
    with pytest.raises(ValueError, match=r"floating-point.*int32.*astype"):
        layer(jnp.zeros((4, 6), jnp.int32))


def test_invalid_reset_and_length_raise(layer: mbx.Mamba1):
    x = jnp.zeros((4, 6))
    with pytest.raises(ValueError, match=r"`reset`.*bool.*\(4,\).*int32"):
        layer(x, reset=jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"`reset`.*\(4,\).*\(3,\)"):
        layer(x, reset=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match=r"`length`.*0\.\.4.*length=5"):
        layer(x, length=5)
    with pytest.raises(ValueError, match=r"`length`.*0\.\.4.*length=-1"):
        layer(x, length=np.int64(-1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`length`.*one integer.*float32"):
        layer(x, length=jnp.array(2.0))
    with pytest.raises(ValueError, match=r"`length`.*shape \(2,\).*jax.vmap"):
        layer(x, length=jnp.array([1, 2]))


def test_wrong_states_raise(layer: mbx.Mamba1):
    x = jnp.zeros((4, 6))
    other = mbx.Mamba1(6, d_state=5, key=key).init_state()
    with pytest.raises(ValueError, match=r"state.ssm.*\(3, 12\).*\(5, 12\).*init_state"):
        layer.scan(x, other)
    with pytest.raises(ValueError, match=r"Mamba1State.*ArrayImpl.*init_state"):
        layer.scan(x, jnp.zeros(3))  # pyright: ignore[reportArgumentType]
    wrong = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer.init_state())
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        layer.step(x[0], wrong)
    with pytest.raises(ValueError, match=r"1 layers must be a tuple of 1.*tuple of 2.*init_state"):
        mbx.Unrolled([layer]).scan(x, (layer.init_state(),) * 2)
    with pytest.raises(ValueError, match=r"2 layers.*first axis of 2.*init_state"):
        mbx.Stacked([layer, layer]).scan(x, layer.init_state())


def test_invalid_tokens_raise(model: mbx.LanguageModel):
    with pytest.raises(ValueError, match=r"one sequence of tokens.*\(2, 3\).*jax.vmap"):
        model(jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"integer tokens.*float32.*tokenizer"):
        model(jnp.zeros(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"one token, of shape \(\).*\(3,\)"):
        model.step(jnp.zeros(3, jnp.int32), model.init_state())
    tokens, one = jnp.zeros((2, 3), jnp.int32), jnp.zeros(3, jnp.int32)
    for verb in ("scan", "backbone", "hidden_states"):
        with pytest.raises(ValueError, match=rf"`LanguageModel\.{verb}` takes one sequence"):
            getattr(model, verb)(tokens)
    for verb in ("step", "backbone_step"):
        with pytest.raises(ValueError, match=rf"`LanguageModel\.{verb}` takes one token"):
            getattr(model, verb)(one, model.init_state())
    with pytest.raises(ValueError, match=r"`length` of `LanguageModel`.*length=4"):
        model.hidden_states(one, length=4)
    with pytest.raises(ValueError, match=r"`Unrolled\.hidden_states` takes one sequence"):
        model.layers.hidden_states(jnp.zeros((2, 3, 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "`d_model` must be an integer of at least 1, but got d_model=0"),
        ({"d_state": -1}, "`d_state`.*-1"),
        ({"d_inner": 2.5}, "`d_inner`.*2.5"),
        ({"dt_rank": True}, "`dt_rank`.*True"),
        ({"d_conv": 0}, "`d_conv`.*0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min <= dt_max.*dt_min=0.2.*dt_max=0.1"),
        ({"dt_init_floor": 0.0}, "`dt_init_floor` must be a positive number.*0.0"),
        ({"bias": 1}, "`bias` must be True or False.*1"),
        ({"select_norm_eps": 1.0}, "`select_norm_eps` must be a number between 0 and 1.*=1.0"),
        ({"select_norm": "layer"}, '`select_norm` must be "weighted".*"weightless".*\'layer\''),
        ({"select_norm_eps": 0.0}, "`select_norm_eps` must be a number between 0 and 1.*=0.0"),
    ],
)
def test_invalid_options_of_mamba1_raise(options: dict[str, Any], message: str):
    for make in (lambda **fields: mbx.Mamba1(**fields, key=key), mbx.Mamba1Config):
        if make is mbx.Mamba1Config and options.keys() & {"dt_min", "dt_init_floor"}:
            continue
        with pytest.raises(ValueError, match=message):
            make(**{"d_model": 6, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"headdim": 5},
            r"`headdim` must divide `d_inner` \(2 \* d_model by def.*=5 and d_inner=24",
        ),
        ({"headdim": 64}, "headdim=64 and d_inner=24"),
        ({"headdim": 0}, "`headdim`.*0"),
        ({"ngroups": 4}, r"`ngroups` must divide the number of heads.*ngroups=4 and 6 heads"),
        ({"ngroups": 0}, "`ngroups`.*0"),
        ({"d_state": 0}, "`d_state`.*0"),
        ({"d_ssm": 25}, "`d_ssm` must be at most `d_inner`.*d_ssm=25 and d_inner=24"),
        ({"d_ssm": 6}, r"`headdim` must divide `d_ssm` \(d_inner by default.*=4 and d_ssm=6"),
        ({"d_ssm": 8, "ngroups": 3}, "ngroups=3 and 2 heads .d_ssm=8"),
        ({"d_ssm": 0}, "`d_ssm`.*0"),
        ({"dt_limit": (0.2, 0.1)}, r"`dt_limit`.*0 <= smallest <= largest.*\(0\.2, 0\.1\)"),
        ({"dt_limit": (-0.1, 0.1)}, "`dt_limit`.*-0.1"),
        ({"dt_limit": (0.0, 0.0)}, "`dt_limit`.*0.0"),
        ({"dt_limit": (float("nan"), 1.0)}, "`dt_limit`.*nan"),
        ({"dt_limit": (0.1,)}, r"`dt_limit` must be a tuple of two numbers.*\(0.1,\)"),
        ({"dt_limit": ("a", 1.0)}, "`dt_limit` must be a tuple of two numbers"),
        ({"dt_limit": (True, 1.0)}, "`dt_limit` must be a tuple of two numbers"),
        ({"dt_limit": None}, "`dt_limit` must be a tuple of two numbers"),
        ({"norm_eps": -1.0}, "`norm_eps` must be a number between 0 and 1.*-1"),
        ({"norm_eps": 2.0}, "`norm_eps` must be a number between 0 and 1.*2"),
        ({"rms_norm": 1}, "`rms_norm` must be True or False.*1"),
        ({"ssm_multipliers": (1.0,) * 4}, r"`ssm_multipliers` must be a tuple of 5 positive.*`dt`"),
        ({"ssm_multipliers": (1.0, 1.0, 0.0, 1.0, 1.0)}, r"`ssm_multipliers`.*\(1.0, 1.0, 0.0"),
        ({"ssm_multipliers": (1.0, 1.0, -1, 1.0, 1.0)}, "`ssm_multipliers`.*-1"),
        ({"ssm_multipliers": (float("inf"),) * 5}, "`ssm_multipliers`.*inf"),
        ({"ssm_multipliers": (True,) * 5}, "`ssm_multipliers`.*True"),
        ({"ssm_multipliers": 2.0}, "`ssm_multipliers`.*=2.0"),
        (
            {"norm_before_gate": True, "rms_norm": False},
            "`norm_before_gate.*needs the norm.*=False",
        ),
    ],
)
def test_invalid_options_of_mamba2_raise(options: dict[str, Any], message: str):
    for make in (lambda **fields: mbx.Mamba2(**fields, key=key), mbx.Mamba2Config):
        with pytest.raises(ValueError, match=message):
            make(**{"d_model": 12, "headdim": 4, **options})


def test_wrong_arguments_of_mamba2_raise():
    with pytest.raises(ValueError, match=r"`A_init_range` must be two positive.*\(0\.0, 1\.0\)"):
        mbx.Mamba2(12, headdim=4, A_init_range=(0.0, 1.0), key=key)
    layer = mbx.Mamba2(12, headdim=4, d_state=3, key=key)
    wrong = mbx.Mamba2(12, headdim=6, d_state=3, key=key).init_state()
    with pytest.raises(ValueError, match=r"state.ssm.*\(3, 6, 4\).*\(3, 4, 6\).*init_state"):
        layer.scan(jnp.zeros((2, 12)), wrong)
    with pytest.raises(ValueError, match=r"`Mamba2\.scan` takes one sequence.*\(2, 3, 12\)"):
        layer(jnp.zeros((2, 3, 12)))
    with pytest.raises(ValueError, match=r"ngroups=5 and channels=12"):
        mbx.layers.GatedRMSNorm(12, ngroups=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_inner": 25}, "`headdim` must divide `d_inner`.*headdim=4 and d_inner=25"),
        ({"ngroups": 4}, "`ngroups` must divide the number of heads.*ngroups=4 and 6 heads"),
        ({"mimo_rank": 0}, "`mimo_rank`.*an integer of at least 1"),
        ({"rope_fraction": 0.25}, "`rope_fraction` must be 0.5 or 1.*rope_fraction=0.25"),
        ({"d_state": 3}, "must be at least 2.*d_state=3 and rope_fraction=0.5"),
        ({"A_activation": "exp"}, "`A_activation` must be.*'exp'"),
        ({"A_floor": 0.0}, "`A_floor` must be a positive number.*A_floor=0.0"),
        ({"norm_eps": -1.0}, "`norm_eps`.*-1"),
        ({"rope_fraction": "1"}, "`rope_fraction` must be a positive number.*'1'"),
        ({"outproj_norm": 1}, "`outproj_norm` must be True or False.*1"),
    ],
)
def test_invalid_options_of_mamba3_raise(options: dict[str, Any], message: str):
    for make in (lambda **fields: mbx.Mamba3(**fields, key=key), mbx.Mamba3Config):
        with pytest.raises(ValueError, match=message):
            make(**{"d_model": 12, "headdim": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_inner": 25}, "`headdim` must divide `d_inner`.*headdim=4 and d_inner=25"),
        ({"ngroups": 4}, "`ngroups` must divide the number of heads.*ngroups=4 and 6 heads"),
        ({"d_state": 0}, "`d_state`.*an integer of at least 1"),
        ({"d_conv": 1.5}, "`d_conv`.*an integer of at least 1"),
        ({"norm_eps": -1.0}, "`norm_eps`.*-1"),
    ],
)
def test_invalid_options_of_gated_delta_net_raise(options: dict[str, Any], message: str):
    for make in (lambda **fields: mbx.GatedDeltaNet(**fields, key=key), mbx.GatedDeltaNetConfig):
        with pytest.raises(ValueError, match=message):
            make(**{"d_model": 12, "headdim": 4, **options})


def test_wrong_arguments_of_mamba3_raise():
    layer = mbx.Mamba3(12, headdim=4, d_state=4, key=key)
    wrong = mbx.Mamba3(12, headdim=4, d_state=4, rope_fraction=1, key=key).init_state()
    with pytest.raises(ValueError, match=r"state.angle.*\(6, 1\).*\(6, 2\).*init_state"):
        layer.scan(jnp.zeros((2, 12)), wrong)
    with pytest.raises(ValueError, match=r"`Mamba3\.scan` takes one sequence.*\(2, 3, 12\)"):
        layer(jnp.zeros((2, 3, 12)))


def test_options_that_are_no_bools_raise(layer: mbx.Mamba1):
    wrong: Any = "yes"
    for make in (
        lambda: mbx.GatedMLP(6, 4, bias=wrong, key=key),
        lambda: mbx.CausalConv1d(6, use_bias=wrong, key=key),
        lambda: mbx.Block(layer, rms_norm=wrong),
        lambda: mbx.layers.GatedRMSNorm(6, norm_before_gate=wrong),
    ):
        with pytest.raises(ValueError, match=r"must be True or False, but got .*='yes'"):
            make()


def test_invalid_models_and_stacks_raise(layer: mbx.Mamba1):
    stack = mbx.Unrolled([layer])
    with pytest.raises(ValueError, match=r"at least `vocab_size`.*_size=8 and vocab_size=9"):
        mbx.LanguageModel(stack, vocab_size=9, padded_vocab_size=8, key=key)
    for eps in (-1.0, 0.0, 1.0, float("nan")):
        message = f"eps` must be a number between 0 and 1, but got .*eps={eps}"
        with pytest.raises(ValueError, match="`norm_" + message):
            mbx.Block(layer, norm_eps=eps)
        with pytest.raises(ValueError, match="`" + message):
            mbx.layers.GatedRMSNorm(4, eps=eps)
    for kind in (mbx.Unrolled, mbx.Stacked):
        with pytest.raises(ValueError, match=r"`remat` of .* must be True, False, or one of"):
            kind([layer], remat="products")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least one layer"):
        mbx.Unrolled([])
    wrong: Any = mbx.Mamba1Config(6)
    with pytest.raises(ValueError, match=r"`mixer` must be a layer, but .*Mamba1Config.*`build`"):
        mbx.Block(wrong)
    wrong = mbx.GatedMLPConfig(8)
    with pytest.raises(ValueError, match=r"`mlp` must be a layer, but .*GatedMLPConfig.*`build`"):
        mbx.Block(layer, mlp=wrong)
    with pytest.raises(ValueError, match="layer 0 has d_model=6 and layer 1 has d_model=7"):
        mbx.Unrolled([layer, mbx.Mamba1(7, key=key)])
    with pytest.raises(ValueError, match=r"layer 1.*differs from layer 0.*Unrolled"):
        mbx.Stacked([layer, mbx.Mamba1(6, d_state=4, key=key)])


def test_invalid_options_of_scans_raise():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"chunked., .sequential., .associative.*'fast'"):
        ops.selective_scan(x, x, -x[:2], x, x, None, method="fast")  # pyright: ignore
    with pytest.raises(ValueError, match=r"`chunk_size` must be at least 1.*-1"):
        ops.selective_scan(x, x, -x[:2], x, x, None, chunk_size=-1)
    with pytest.raises(ValueError, match=r"sequential., .associative.*'chunked'"):
        ops.linear_recurrence(x, x, method="chunked")  # pyright: ignore


def test_invalid_options_of_ssd_raise():
    x, dt, B = jnp.ones((3, 4, 2)), jnp.ones((3, 4)), jnp.ones((3, 2, 5))
    with pytest.raises(ValueError, match=r'"chunked", "sequential" or None.*fast'):
        ops.ssd(x, dt, -dt[0], B, B, None, method="fast")  # pyright: ignore
    with pytest.raises(ValueError, match=r"`chunk_size` must be at least 1.*0"):
        ops.ssd(x, dt, -dt[0], B, B, None, chunk_size=0)
    B = jnp.ones((3, 3, 5))
    with pytest.raises(ValueError, match=r"ngroups=3 and nheads=4"):
        ops.ssd(x, dt, -dt[0], B, B, None)
    with pytest.raises(ValueError, match=r"ngroups=3 and nheads=4"):
        ops.ssd_step(x[0], dt[0], -dt[0], B[0], B[0], None, state=jnp.zeros((5, 4, 2)))
