"""The laws of sequence layers, checked for every layer in `tests/support/registry.py`.

`docs/api/protocol.md` has a table of the laws. Each test is named after the law that it checks.
"""

import itertools
import re
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, strategies as st

import mamba_eqx as mbx
from tests.support.cases import (
    CONFIG_TYPES,
    DTYPES,
    THOROUGH,
    assert_close,
    fixed_case,
    fold,
    fold_in_jax,
    make_case,
    plans,
    precision,
    quick,
    rebuild,
    scan,
    scan_uncompiled,
    step,
    structure,
)
from tests.support.registry import (
    CONFIGS,
    EVERYTHING,
    LANGUAGE_MODELS,
    LAYERS,
    MIXERS,
    SIZES,
    Sizes,
    make_inputs,
    make_layer,
)


pytestmark = pytest.mark.usefixtures("compile_fast")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES)
all_layers = pytest.mark.parametrize("name", EVERYTHING)
mixers_in_all_dtypes = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] if dtype == "bfloat16" else [])
        for name in EVERYTHING
        for dtype in DTYPES
        if name in MIXERS or dtype == "float32"
    ],
)
# Once *recurrence* holds in all dtypes, one dtype is enough for the laws that concern the same
# arithmetic, and float64 reveals the smallest mistakes.
mixers_in_float64 = (
    mixers_in_all_dtypes
    if THOROUGH
    else pytest.mark.parametrize(
        ("name", "dtype"),
        [(name, "float64" if name in MIXERS else "float32") for name in EVERYTHING],
    )
)


def test_docs_list_every_law():
    """The table of laws in the docs and the tests here match, and the class docstring of the
    protocol names a selection of these laws."""
    page = (Path(__file__).parents[1] / "docs/api/protocol.md").read_text()
    table = page.partition("| law | statement |")[2].partition("\n\n")[0]
    laws = re.findall(r"^\| ([a-z]+) \|", table, flags=re.MULTILINE)
    tests = {name for name in globals() if re.match("test_(?!docs)", name)}
    assert {name.split("_")[1] for name in tests} == set(laws)
    assert {f"test_{law}" for law in laws} <= tests
    summary = re.findall(r"- \*([a-z]+)\*:", str(mbx.AbstractSequenceLayer.__doc__))
    assert set(summary) <= set(laws)


@mixers_in_all_dtypes
@given(data=st.data())
def test_recurrence(name: str, dtype: str, data: Any):
    """`scan` equals `step` folded over the sequence, in outputs and state, from any state."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, dtype)), dtype)
        assert_close(
            scan(case.layer, case.x, case.state), fold(case.layer, case.x, case.state), dtype
        )


@mixers_in_float64
@given(data=st.data())
def test_splitting(name: str, dtype: str, data: Any):
    """`scan` of two pieces, the second from the first one's state, equals `scan` of both joined."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, dtype)), dtype)
        y1, middle = scan(case.layer, case.x[: case.cut], case.state, case.reset[: case.cut])
        y2, end = scan(case.layer, case.x[case.cut :], middle, case.reset[case.cut :])
        y = np.concatenate([np.asarray(y1), np.asarray(y2)])
        assert_close((y, end), scan(case.layer, case.x, case.state, case.reset), dtype)


@all_layers
@given(data=st.data())
def test_causality(name: str, data: Any):
    """A token influences no output before it."""
    case = make_case(name, data.draw(plans(name)))
    other = case.x.copy()
    other[case.cut :] = 1 - case.x[case.cut :]
    y, changed = scan(case.layer, case.x, case.state)[0], scan(case.layer, other, case.state)[0]
    np.testing.assert_array_equal(y[: case.cut], changed[: case.cut])


@mixers_in_float64
@given(data=st.data())
def test_reset(name: str, dtype: str, data: Any):
    """`scan` with `reset` equals separate runs of the segments, the first from the given state."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, dtype)), dtype)
        want = fold(case.layer, case.x, case.state, case.reset)
        assert_close(scan(case.layer, case.x, case.state, case.reset), want, dtype)


@all_layers
def test_reset_forgets_nan(name: str):
    """NaN in the state does not survive a reset."""
    layer, x = fixed_case(name, 4)
    reset = np.array([True, False, False, False])
    empty = layer.init_state(max_len=128)
    # A counter cannot be NaN, so it counts some tokens.
    state = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 5), empty
    )
    assert_close(scan(layer, x, state, reset), scan(layer, x, empty, reset), "float32")


@mixers_in_float64
@given(data=st.data())
def test_length(name: str, dtype: str, data: Any):
    """`scan` with `length` equals `scan` of the real tokens, even if padding has NaN or resets."""
    with precision(dtype):
        case = make_case(name, data.draw(plans(name, dtype)), dtype)
        n = case.cut
        want = scan(case.layer, case.x[:n], case.state, case.reset[:n])
        x = case.x.copy()
        if name not in LANGUAGE_MODELS:
            x[n:] = np.nan
        y, end = scan(case.layer, x, case.state, case.reset, n)
        assert_close((y[:n], end), want, dtype)


@all_layers
@all_dtypes
def test_closure(name: str, dtype: str):
    """`init_state`, `scan` and `step` return the same structure, shapes and dtypes."""
    with precision(dtype):
        for s in SIZES if name in MIXERS else SIZES[:1]:
            layer, x = make_layer(name, s, dtype, 0), jnp.asarray(make_inputs(name, s, 3, dtype, 0))
            state, reset = layer.init_state(max_len=128), jnp.array([False, True, False])
            like = jax.eval_shape(lambda state=state: state)
            # Without a state, the capacity of a cache is the length of the sequence.
            alone = jax.eval_shape(lambda layer=layer: layer.init_state(max_len=3))
            many = itertools.product((None, state), (None, reset), (None, jnp.array(2)))
            for options in many if s == SIZES[0] else [(None, reset, None), (state, None, None)]:
                want = alone if options[0] is None else like
                assert jax.eval_shape(scan, layer, x, *options)[1] == want
            assert jax.eval_shape(step, layer, x[0], state)[1] == like


@all_layers
def test_closure_under_lax_scan(name: str):
    """A state is a valid carry of `jax.lax.scan`."""
    layer, x = fixed_case(name, 4)
    state = layer.init_state(max_len=128)
    assert_close(fold_in_jax(layer, state, x), scan(layer, x, state), "float32")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("x_dtype", DTYPES[:2])
def test_dtype(name: str, dtype: str, x_dtype: str):
    """The output has the dtype of the input, whatever the dtype of the parameters."""
    layer = make_layer(name, SIZES[0], dtype, 0)
    x = jnp.asarray(make_inputs(name, SIZES[0], 3, x_dtype, 0))
    assert jax.eval_shape(layer, x).dtype == x_dtype
    assert jax.eval_shape(step, layer, x[0], layer.init_state(max_len=128))[0].dtype == x_dtype


@all_layers
def test_dtype_of_recurrence(name: str):
    """In a bfloat16 layer, the parameters of recurrences and hidden states stay in float32."""
    made = make_layer(name, SIZES[0], "bfloat16", 0)
    for layer in (made, mbx.cast(make_layer(name, SIZES[0], "float32", 0), jnp.bfloat16)):
        mask = mbx.recurrence_mask(layer)
        for leaf, recurrence in zip(jax.tree.leaves(layer), jax.tree.leaves(mask), strict=True):
            assert leaf.dtype == (jnp.float32 if recurrence else jnp.bfloat16)
        is_cache = lambda node: isinstance(node, mbx.KVCache)
        state = layer.init_state(max_len=128)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_cache):
            if isinstance(leaf, mbx.KVCache):
                assert leaf.k.dtype == leaf.v.dtype == jnp.bfloat16
                continue
            # The whole state of Mamba-3 belongs to the recurrence.
            kept = jax.tree_util.keystr(path).endswith((".ssm", ".angle", ".k", ".v"))
            assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16)


@all_layers
@given(data=st.data())
def test_batching(name: str, data: Any):
    """`vmap` of `scan` and of `step` equals a loop over the batch."""
    seeds = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    layer, s = make_layer(name, SIZES[0], "float32", 0), SIZES[0]
    empty = layer.init_state(max_len=128)
    pasts = [fold(layer, make_inputs(name, s, 5, "float32", seed), empty)[1] for seed in seeds]
    x = np.stack([make_inputs(name, s, 4, "float32", 10 + seed) for seed in seeds])
    reset = np.random.default_rng(seeds).random((3, 4)) < 0.3
    length = np.array([4, 0, 2])

    def stack(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    batched = jax.vmap(scan, in_axes=(None, 0, 0, 0, 0))
    y, states = batched(layer, x, stack(pasts), reset, length)
    for i in range(3):
        y_i, state = scan(layer, x[i], pasts[i], reset[i], length[i])
        assert_close(y[i, : length[i]], y_i[: length[i]], "float32")
        assert_close(jax.tree.map(lambda leaf: leaf[i], states), state, "float32")  # noqa: B023

    one_by_one = stack([step(layer, x[i, 0], pasts[i]) for i in range(3)])
    batched = jax.vmap(step, in_axes=(None, 0, 0))
    assert_close(batched(layer, x[:, 0], stack(pasts)), one_by_one, "float32")


@all_layers
def test_pytree(name: str):
    """`jax.jit`, `jax.grad`, `jax.tree.map` and serialisation work on layers."""
    layer, x = fixed_case(name, 4)
    x = jnp.asarray(x)
    value_and_grad = quick(jax.value_and_grad(lambda layer: jnp.mean(layer(x) ** 2)))
    loss, grads = value_and_grad(layer)
    assert jax.tree.structure(grads) == jax.tree.structure(layer)
    # NumPy needs no compilation.
    rate = 1e-3 / np.sqrt(sum(np.square(np.asarray(g)).sum() for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g: np.asarray(p) - rate * np.asarray(g), layer, grads)
    assert value_and_grad(moved)[0] < loss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.eqx"
        eqx.tree_serialise_leaves(path, layer)
        other = make_layer(name, SIZES[0], "float32", 1)
        jax.tree.map(np.testing.assert_array_equal, eqx.tree_deserialise_leaves(path, other), layer)


@pytest.mark.parametrize(
    ("name", "s", "seq"),
    [(name, SIZES[0], 40) for name in EVERYTHING]
    + [(name, s, 3) for name in MIXERS for s in SIZES[1:]],
)
def test_gradients(name: str, s: Sizes, seq: int):
    """The gradients of `scan` equal the gradients of `step` folded: for inputs, parameters and
    initial state, through the outputs and through the final state."""
    with jax.enable_x64(True):
        layer = make_layer(name, s, "float64", 0)
        x = jnp.asarray(make_inputs(name, s, seq, "float64", 0))
        past = make_inputs(name, s, 5, "float64", 1)
        state = fold(layer, past, layer.init_state(max_len=128))[1]
        # Token ids and counters have no derivative.
        varied, fixed = eqx.partition((layer, state, x), eqx.is_inexact_array)

        def gradients(run: Any) -> Any:
            def loss(varied: Any) -> Any:
                out, rng = run(*eqx.combine(varied, fixed)), np.random.default_rng(2)
                leaves = jax.tree.leaves(eqx.filter(out, eqx.is_inexact_array))
                return sum(jnp.vdot(rng.standard_normal(leaf.shape), leaf) for leaf in leaves)

            return quick(jax.grad(loss))(varied)

        want = gradients(fold_in_jax)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
        assert_close(gradients(lambda layer, state, x: layer.scan(x, state)), want, "float64")


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_equal_finite_differences(name: str):
    """The gradients of `scan` equal finite differences."""
    with jax.enable_x64(True):
        layer = make_layer(name, SIZES[0], "float64", 0)
        x = jnp.asarray(make_inputs(name, SIZES[0], 3, "float64", 0))
        state = fold(layer, np.asarray(x), layer.init_state(max_len=128))[1]
        varied, fixed = eqx.partition((layer, x, state), eqx.is_inexact_array)

        @jax.jit
        def run(varied: Any) -> Any:
            return eqx.filter(scan_uncompiled(*eqx.combine(varied, fixed)), eqx.is_inexact_array)

        jax.test_util.check_grads(run, (varied,), order=1, modes=["rev"])


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_in_forward_mode(name: str):
    """Forward-mode derivatives of `step` folded equal reverse-mode derivatives of `scan`."""
    with jax.enable_x64(True):
        layer = make_layer(name, SIZES[0], "float64", 0)
        tangent = make_layer(name, SIZES[0], "float64", 1)
        x = jnp.asarray(make_inputs(name, SIZES[0], 4, "float64", 0))

        @quick
        def run(layer: Any, tangent: Any) -> Any:
            start = layer.init_state(max_len=128)
            y, y_dot = jax.jvp(lambda layer: fold_in_jax(layer, start, x)[0], (layer,), (tangent,))
            (grads,) = jax.vjp(lambda layer: layer(x), layer)[1](y)
            return jnp.vdot(y, y_dot), grads

        forward, grads = run(layer, tangent)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(tangent), strict=True)
        np.testing.assert_allclose(forward, sum(np.vdot(a, b) for a, b in pairs))


PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, PRODUCTS], ids=["everything", "products"])
def test_stack(remat: Any):
    """`Stacked` and `Unrolled` have the same outputs, states and gradients."""
    name, s = "block_mlp", SIZES[0]
    layers = [make_layer(name, s, "float32", seed) for seed in range(3)]
    unrolled, stacked = mbx.Unrolled(layers), mbx.Stacked(layers, remat=remat)
    assert eqx.tree_equal(mbx.Unrolled(stacked.unstack()), unrolled)
    x = make_inputs(name, s, 40, "float32", 0)
    reset = np.isin(np.arange(40), [0, 17, 35])

    for run in (
        lambda stack: scan(stack, x, stack.init_state(), reset),
        lambda stack: fold(stack, x[:2], stack.init_state()),
    ):
        (y, states), (want_y, want_states) = run(stacked), run(unrolled)
        assert_close(y, want_y, "float32")
        want_states = jax.tree.map(lambda *leaves: np.stack(leaves), *want_states)
        assert_close(states, want_states, "float32")
    hidden = unrolled.hidden_states(jnp.asarray(x))
    assert_close(stacked.hidden_states(jnp.asarray(x)), hidden, "float32")
    assert_close(hidden[-1], unrolled(jnp.asarray(x)), "float32")

    gradient = quick(jax.grad(lambda stack: jnp.sum(jnp.sin(stack(jnp.asarray(x))))))
    assert_close(gradient(stacked).unstack(), gradient(unrolled).unstack(), "float32")


@pytest.mark.parametrize("kind", [mbx.Unrolled, mbx.Stacked])
def test_stack_with_remat_recomputes(kind: Any):
    """`remat` recomputes the products that its policy does not store."""
    layer, x = fixed_case("block_mlp", 5)

    def products(remat: Any) -> int:
        gradient = jax.grad(lambda stack, x: jnp.sum(stack(x)))
        return str(jax.make_jaxpr(gradient)(kind([layer], remat=remat), x)).count("dot_general")

    assert products(False) == products(PRODUCTS) < products(True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stacked", [False, True])
def test_config(name: str, stacked: bool):
    """Reading a config from the model that it built, or from JSON, returns the same config."""
    config = CONFIGS[name]
    model = eqx.filter_eval_shape(lambda key: config.build(stacked=stacked, key=key), jr.key(0))
    assert mbx.LanguageModelConfig.of(model) == config
    assert mbx.LanguageModelConfig.from_json(config.to_json()) == config


@all_layers
def test_config_rebuilds_layers(name: str):
    """The config of a layer builds a layer of the same structure, shapes and kinds of dtypes."""
    for sizes in SIZES if name in MIXERS else SIZES[:1]:
        layer = make_layer(name, sizes, "float32", 0)
        if isinstance(layer, (*CONFIG_TYPES, mbx.Block, mbx.LanguageModel)):
            assert structure(rebuild(layer)) == structure(layer)


# Compiling with XLA's optimisations takes long, so the quick run checks the mixers only.
@pytest.mark.parametrize(
    "name",
    [name if name in MIXERS else pytest.param(name, marks=pytest.mark.slow) for name in EVERYTHING],
)
def test_jit(name: str):
    """Every method gives the same result under `jit`, and other values do not recompile."""
    layer, x = fixed_case(name, 7)
    x, state = jnp.asarray(x), layer.init_state(max_len=128)
    reset, length = jnp.arange(7) == 3, jnp.array(5)
    traces = []

    @jax.jit
    def run(layer: Any, x: Any, state: Any, reset: Any, length: Any) -> Any:
        traces.append(1)
        y, state = layer.scan(x, state, reset=reset, length=length)
        y_t, state = layer.step(x[0], state)
        return layer(x), y[:5], y_t, state

    y, end = scan(layer, x, state, reset, length)
    y_t, end = layer.step(x[0], end)  # without `jit`
    want = (scan(layer, x, None)[0], y[:5], y_t, end)
    other = make_layer(name, SIZES[0], "float32", 1)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        assert_close(run(layer, x, state, reset, length), want, "float32")
        run(other, 1 - x, end, ~reset, length + 1)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert len(traces) == 1
