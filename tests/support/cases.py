"""Cases for the laws: Hypothesis strategies, the ways to run a layer, and their comparison."""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from hypothesis import strategies as st
from jax import lax

import mamba_eqx as mbx
from tests.support.registry import MIXERS, SIZES, Sizes, make_inputs, make_layer


# Relative to the largest compared entry, or to 1 if all entries are smaller. Two ways to sum the
# same products differ by a few units in the last place, which are 2^-24, 2^-8 and 2^-53.
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float64": 1e-12}
DTYPES = list(TOLERANCE)

# Whether the laws run with more examples, sizes, lengths and dtypes (docs/api/protocol.md).
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

# The lengths of two pieces. Every new length has to be compiled, so there are few of them. 1 and 3
# are shorter than the convolutions; 37 and 40 tokens are more than one chunk of a scan.
CUTS = [(1, 3), (3, 37), (37, 3), (3, 0), (0, 3)]


def _known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Selects the compiler options that the installed XLA knows, since they change between
    versions."""
    known = {}
    for name, value in options.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


# `jax.jit` that compiles quickly to slow code, because the tests spend far more time compiling than
# running. (`conftest.py` switches the fusion emitters off too, but only with several processes.)
quick = functools.partial(
    jax.jit,
    compiler_options=_known_options(
        {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    ),
)


class Plan(NamedTuple):
    """The choices of Hypothesis, small enough to be printed when a law fails."""

    sizes: Sizes
    seed: int
    """The seed of the parameters and of the inputs."""
    seq: int
    cut: int
    """An index at which to cut the sequence, within `0..seq`."""
    resets: frozenset[int]
    """The tokens at which `reset` is true."""
    fresh: bool
    """Whether to start from the empty past, rather than from the state after five tokens."""


class Case(NamedTuple):
    """The layer and the arrays that a plan describes."""

    layer: Any
    x: np.ndarray
    state: Any
    reset: np.ndarray
    cut: int


@st.composite
def plans(draw: st.DrawFn, name: str, among: list[Sizes] | None = None) -> Plan:
    """Chooses a case for the layer `name`, in one of the sizes `among`."""
    sizes = draw(st.sampled_from(among or (SIZES if THOROUGH else SIZES[:1])))
    if THOROUGH:
        seq = draw(st.integers(1, 80))
        cut = draw(st.integers(0, seq))
    else:
        # One size is enough for the lengths, and one length is enough for the other sizes.
        cuts = CUTS if name in MIXERS else CUTS[:2]
        cut, rest = draw(st.sampled_from(cuts if sizes == SIZES[0] else CUTS[:1]))
        seq = cut + rest
    resets = draw(st.frozensets(st.integers(0, seq - 1), max_size=4))
    return Plan(sizes, draw(st.integers(0, 2)), seq, cut, resets, draw(st.booleans()))


def make_case(name: str, plan: Plan, dtype: str = "float32") -> Case:
    """Makes the layer and the arrays of a plan."""
    layer = make_layer(name, plan.sizes, dtype, plan.seed)
    state = layer.init_state(max_len=128)
    if not plan.fresh:
        past = make_inputs(name, plan.sizes, 5, dtype, plan.seed + 100)
        state = fold(layer, past, state)[1]
    reset = np.isin(np.arange(plan.seq), list(plan.resets))
    x = make_inputs(name, plan.sizes, plan.seq, dtype, plan.seed)
    return Case(layer, x, state, reset, plan.cut)


def fixed_case(name: str, seq: int) -> tuple[Any, np.ndarray]:
    """Makes a layer and inputs for laws that need no choices."""
    return make_layer(name, SIZES[0], "float32", 0), make_inputs(name, SIZES[0], seq, "float32", 0)


def scan_uncompiled(layer: Any, x: Any, state: Any, reset: Any = None, length: Any = None) -> Any:
    return layer.scan(x, state, reset=reset, length=length)


scan = quick(scan_uncompiled)


@quick
def step(layer: Any, x: Any, state: Any) -> Any:
    return layer.step(x, state)


def fold(layer: Any, x: np.ndarray, state: Any, reset: np.ndarray | None = None) -> Any:
    """Runs `step` on one token after another, from the empty past wherever `reset` is true."""
    y = []
    for t in range(len(x)):
        if reset is not None and reset[t]:
            state = layer.init_state(max_len=128)
        y_t, state = step(layer, x[t], state)
        y.append(np.asarray(y_t))
    return np.stack(y), state


def fold_in_jax(layer: Any, state: Any, x: Any) -> Any:
    """Runs `fold` as one differentiable function."""
    state, y = lax.scan(lambda state, x_t: layer.step(x_t, state)[::-1], state, x)
    return y, state


def assert_close(got: Any, want: Any, dtype: str) -> None:
    """Asserts equal structures, dtypes and shapes, and values equal up to the tolerance."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in leaves:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if jax.tree_util.keystr(path).endswith(".angle"):  # Angles are equal modulo whole turns.
            a = a - 2 * np.pi * np.round((a - b) / (2 * np.pi))
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * scale)


def precision(dtype: str) -> Any:
    """Switches JAX's 64-bit mode on for float64."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


CONFIG_TYPES = {
    mbx.Mamba1: mbx.Mamba1Config,
    mbx.Mamba2: mbx.Mamba2Config,
    mbx.Mamba3: mbx.Mamba3Config,
    mbx.GatedDeltaNet: mbx.GatedDeltaNetConfig,
    mbx.Attention: mbx.AttentionConfig,
    mbx.Parallel: mbx.ParallelConfig,
}


def rebuild(module: Any) -> Any:
    """Reads the config of a module and builds a module from it."""
    options = {}
    if isinstance(module, mbx.LanguageModel):
        config = mbx.LanguageModelConfig.of(module)
        stack: Any = module.layers
        options = {"stacked": isinstance(stack, mbx.Stacked), "remat": stack.remat}
    elif isinstance(module, mbx.Block):
        config = mbx.BlockConfig.of(module)
    else:
        config = CONFIG_TYPES[type(module)].of(module)
    return eqx.filter_eval_shape(lambda key: config.build(**options, key=key), jr.key(0))


def structure(module: Any) -> Any:
    """Returns the structure (static fields included), the shapes and the kinds of dtypes."""
    leaves, treedef = jax.tree.flatten(module)
    return treedef, [(leaf.shape, jnp.issubdtype(leaf.dtype, jnp.floating)) for leaf in leaves]
