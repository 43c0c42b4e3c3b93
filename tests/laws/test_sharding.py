"""Layers on several devices. `test_sharding_on_four_devices` runs this file on four simulated ones;
otherwise there is one, which is enough for JAX to check what varies between devices."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

from tests.support.cases import assert_close, quick, scan, step
from tests.support.laws import all_layers_quickly
from tests.support.registry import SIZES, make_inputs, make_layer


pytestmark = pytest.mark.usefixtures("compile_fast")
ROOT = Path(__file__).parents[2]


@all_layers_quickly("mamba1", "mamba2", "attention")
def test_sharding(name: str):
    """`scan`, `step` and gradients work inside `jax.shard_map`, with its checks, if either the
    inputs or the states vary between devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = len(jax.devices())
    layer = make_layer(name, SIZES[0], "float32", 0)
    x = jnp.stack([make_inputs(name, SIZES[0], 37, "float32", seed) for seed in range(rows)])
    empty, reset = layer.init_state(max_len=128), jnp.arange(37) == 3
    pasts = stacked([step(layer, row[0], empty)[1] for row in x])

    def in_parallel(run: Any, specs: Any, out: Any) -> Any:
        return quick(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out))

    def each_x(layer: Any, x: Any, empty: Any, reset: Any) -> Any:
        fresh = layer.scan(x[0], layer.init_state(max_len=128), reset=reset)
        results = layer(x[0], reset=reset), fresh, layer.step(x[0, 0], empty)
        return stacked([results])

    def each_state(layer: Any, x: Any, pasts: Any) -> Any:
        past = jax.tree.map(lambda leaf: leaf[0], pasts)
        return stacked([(layer.scan(x, past), layer.step(x[0], past))])

    def gradient(layer: Any, x: Any) -> Any:
        mean = lambda layer: jax.lax.pmean(jnp.mean(layer(x[0]) ** 2), "data")
        return eqx.filter_grad(mean)(layer)

    found = in_parallel(each_x, (P(), P("data"), P(), P()), P("data"))(layer, x, empty, reset)
    want = [
        (
            scan(layer, row, None, reset)[0],
            scan(layer, row, empty, reset),
            step(layer, row[0], empty),
        )
        for row in x
    ]
    assert_close(found, stacked(want), "float32")
    found = in_parallel(each_state, (P(), P(), P("data")), P("data"))(layer, x[0], pasts)
    each = [jax.tree.map(lambda leaf: leaf[i], pasts) for i in range(rows)]  # noqa: B023
    want = [(scan(layer, x[0], past), step(layer, x[0, 0], past)) for past in each]
    assert_close(found, stacked(want), "float32")
    found = in_parallel(gradient, (P(), P("data")), P())(layer, x)
    loss = lambda layer: jnp.mean(jnp.stack([jnp.mean(layer(row) ** 2) for row in x]))
    assert_close(found, quick(lambda layer: eqx.filter_grad(loss)(layer))(layer), "float32")


@all_layers_quickly("mamba2", "mamba3", "hybrid")
def test_sharding_with_explicit_axes(name: str):
    """In a mesh with explicit axes, all methods run over rows that are sharded, and give rows.

    JAX derives the shardings while it traces, for which no devices are needed.
    """
    rows = 4
    layer = make_layer(name, SIZES[0], "float32", 0)
    x = jnp.stack([make_inputs(name, SIZES[0], 37, "float32", seed) for seed in range(rows)])
    states, reset = stacked([layer.init_state(max_len=128)] * rows), jnp.arange(37) == 3

    def run(layer: Any, reset: Any, x: Any, states: Any) -> Any:
        y = jax.vmap(lambda x: layer(x, reset=reset))(x)
        after = jax.vmap(lambda x, state: layer.scan(x, state, reset=reset))(x, states)
        return y, after, jax.vmap(layer.step)(x[:, 0], states)

    def gradient(layer: Any, x: Any) -> Any:
        mean = lambda layer: jnp.mean(jax.vmap(layer)(x) ** 2)
        return eqx.filter_grad(mean)(layer)

    def placed(place: Any, mesh: Any) -> Any:
        whole = jax.tree.map(lambda leaf: place(leaf, NamedSharding(mesh, P())), (layer, reset))
        by_row = lambda leaf: place(leaf, NamedSharding(mesh, P("data")))
        return *whole, *jax.tree.map(by_row, (x, states))

    def shape(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    mesh = AbstractMesh((rows,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        arguments = placed(shape, mesh)
        for leaf in jax.tree.leaves(jax.eval_shape(run, *arguments)):
            assert leaf.sharding.spec[0] == "data"
        for leaf in jax.tree.leaves(jax.eval_shape(gradient, arguments[0], arguments[2])):
            assert set(leaf.sharding.spec) <= {None}
    if len(jax.devices()) == rows:
        mesh = jax.make_mesh((rows,), ("data",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            arguments = placed(jax.device_put, mesh)
            found = quick(run)(*arguments), quick(gradient)(arguments[0], arguments[2])
        want = quick(run)(layer, reset, x, states), quick(gradient)(layer, x)
        assert_close(jax.device_get(found), jax.device_get(want), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("names", ["conv or mamba1", "mamba2 or mamba3", "attention or gated"])
def test_sharding_on_four_devices(names: str):
    """The law holds on four devices."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "", __file__]
    command += ["-k", f"not four and not block and not stack and ({names})"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
