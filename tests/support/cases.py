"""Cases for the laws, made from the registry."""

import contextlib
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from hypothesis import strategies as st

import mamba_eqx as mbx
from mamba_eqx.testing._laws import Case
from mamba_eqx.testing._plans import CUTS, Plan, make_case as make_arrays, plans as random_plans
from mamba_eqx.testing._running import (
    assert_close as assert_close,
    fold as fold,
    fold_in_jax as fold_in_jax,
    quick as quick,
    scan as scan,
    scan_uncompiled as scan_uncompiled,
    step as step,
)
from tests.support.registry import MIXERS, SIZES, Sizes, make_inputs, make_layer


DTYPES = ["float32", "bfloat16", "float64"]

# Whether the laws run with more examples, sizes, lengths and dtypes (docs/api/protocol.md).
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


@st.composite
def plans(draw: st.DrawFn, name: str, among: list[Sizes] | None = None) -> tuple[Sizes, Plan]:
    """Chooses a case for the layer `name`, in one of the sizes `among`."""
    sizes = draw(st.sampled_from(among or (SIZES if THOROUGH else SIZES[:1])))
    if THOROUGH:
        return sizes, draw(random_plans(None))
    # One size is enough for the lengths, and one length is enough for the other sizes.
    cuts = CUTS if name in MIXERS else CUTS[:2]
    return sizes, draw(random_plans(cuts if sizes == SIZES[0] else CUTS[:1]))


def make_case(name: str, plan: tuple[Sizes, Plan], dtype: str = "float32") -> Case:
    """Makes the layer and the arrays of a plan."""
    sizes, choices = plan
    layer = make_layer(name, sizes, dtype, choices.seed)
    inputs = lambda seq, seed: make_inputs(name, sizes, seq, dtype, seed)
    return make_arrays(layer, inputs, choices)


def fixed_case(name: str, seq: int) -> tuple[Any, np.ndarray]:
    """Makes a layer and inputs for laws that need no choices."""
    return make_layer(name, SIZES[0], "float32", 0), make_inputs(name, SIZES[0], seq, "float32", 0)


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
