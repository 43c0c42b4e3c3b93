"""Loading onto several devices, each of which reads only its own part of every tensor."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import SingleDeviceSharding

import mamba_eqx as mbx
from tests.support.checkpoints import BOTH, EXPERTS, assert_same, config, make, nemotron_h


PROGRAM = """
import sys
import jax, ml_dtypes, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import mamba_eqx as mbx
from mamba_eqx.pretrained._arrays import to_jax

folder = sys.argv[1]
devices = jax.devices()
assert len(devices) == 4
mesh = Mesh(np.array(devices).reshape(4), ("model",))
whole = mbx.from_pretrained(folder)
everywhere = mbx.from_pretrained(folder, sharding=NamedSharding(mesh, P()))

asked = {}
def choose(path, leaf):
    asked[path] = leaf
    divided = [axis for axis, size in enumerate(leaf.shape) if size % 4 == 0]
    axes = [None] * len(leaf.shape)
    if divided:
        axes[divided[-1]] = "model"
    return NamedSharding(mesh, P(*axes))

for dtype in (None, "bfloat16"):
    sharded = mbx.from_pretrained(folder, sharding=choose, dtype=dtype)
    plain = mbx.from_pretrained(folder, dtype=dtype)
    for model in (sharded, everywhere) if dtype is None else (sharded,):
        assert jax.tree.structure(model) == jax.tree.structure(plain)
        for (path, got), want in zip(jax.tree.leaves_with_path(model), jax.tree.leaves(plain)):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            assert got.dtype == want.dtype, name
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=name)
            if model is everywhere:
                assert got.sharding.is_fully_replicated
                continue
            assert (asked[name].shape, asked[name].dtype) == (want.shape, want.dtype)
            assert got.sharding == choose(name, want)
            for shard in got.addressable_shards:
                np.testing.assert_array_equal(
                    np.asarray(shard.data), np.asarray(want)[shard.index], err_msg=name
                )
assert "layers.layers.1.mixer.in_proj.weight" in asked
assert {s.data.shape for s in sharded.embedding.weight.addressable_shards} == {(16, 2)}

# Only a part of a file is read at a time.
class File(np.ndarray):
    def __getitem__(self, index):
        parts.append(super().__getitem__(index).nbytes)
        return super().__getitem__(index)

parts = []
stored = np.arange(64, dtype=np.float32).reshape(8, 8).view(File)
dtype, half = np.dtype(ml_dtypes.bfloat16), NamedSharding(mesh, P("model"))
array = to_jax("x", [stored], (8, 8), dtype, NamedSharding(mesh, P(None, "model")))
assert parts == [64] * 4
np.testing.assert_array_equal(np.asarray(array, np.float32), stored)
# One array of several tensors, whose boundaries differ from those of the devices.
for place in (half, NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())):
    array = to_jax("x", [stored[:3], stored[3:5], stored[5:]], (8, 8), dtype, place)
    assert array.sharding == place
    np.testing.assert_array_equal(np.asarray(array, np.float32), stored)

# An array of experts, with one or two tensors for each of them.
stored = np.arange(4 * 8 * 3, dtype=np.float32).reshape(4, 8, 3)
rows = stored.reshape(32, 3).view(File)
for sizes in ([8] * 4, [5, 3] * 4):
    ends = np.cumsum([0, *sizes])
    tensors = [rows[a:b] for a, b in zip(ends, ends[1:])]
    for axes in (P("model"), P(None, "model"), P()):
        place = NamedSharding(mesh, axes)
        parts.clear()
        array = to_jax("x", tensors, stored.shape, np.dtype(np.float32), place)
        assert array.sharding == place
        np.testing.assert_array_equal(np.asarray(array), stored)
        assert sum(parts) == stored.nbytes
square = NamedSharding(Mesh(np.array(devices).reshape(2, 2), ("a", "b")), P("a", "b"))
array = to_jax("x", tensors, stored.shape, np.dtype(np.float32), square)
np.testing.assert_array_equal(np.asarray(array), stored)

# Nothing is loaded if one of the shardings does not fit.
try:
    mbx.from_pretrained(folder, sharding=NamedSharding(mesh, P("model")))
except ValueError as error:
    name = "layers.layers.0.mixer.x_proj.weight"
    assert f"does not fit '{name}' of shape (9, 16)" in str(error), error
    assert "Give a function" in str(error)
else:
    raise AssertionError("not refused")
print("all is well")
"""


PROGRAM_OF_EXPERTS = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import mamba_eqx as mbx

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "model"))
def choose(path, leaf):
    axes = (None, "expert", "model") if path.endswith("fc1") else ("expert", None, "model")
    of_experts = path.endswith(("mlp.fc1", "mlp.fc2"))
    return NamedSharding(mesh, P(*axes) if of_experts else P())

want = mbx.from_pretrained(sys.argv[1])
got = mbx.from_pretrained(sys.argv[1], sharding=choose)
for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for shard in one.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(other)[shard.index])
fc1 = got.layers.layers[0].mlp.fc1
assert {shard.data.shape for shard in fc1.addressable_shards} == {(4, 3, 4)}
print("all is well")
"""


@pytest.mark.slow
def test_loads_onto_four_devices(tmp_path: Path):
    model = make(config(mbx.Mamba1Config(d_model=8, d_state=4), padded_vocab_size=16))
    mbx.save_pretrained(model, tmp_path)
    run_on_four_devices(PROGRAM, tmp_path)


@pytest.mark.slow
def test_loads_experts_onto_four_devices(tmp_path: Path):
    experts = dataclasses.replace(EXPERTS, d_intermediate=6, n_experts=4, n_group=2, top_k=2)
    mixer = mbx.AttentionConfig(8, nheads=2)
    mbx.save_pretrained(make(nemotron_h((mixer, experts))), tmp_path)
    run_on_four_devices(PROGRAM_OF_EXPERTS, tmp_path)


def run_on_four_devices(program: str, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout == "all is well\n", result.stderr


def test_one_sharding_applies_to_all_parameters(tmp_path: Path):
    model = make(BOTH["tied"])
    mbx.save_pretrained(model, tmp_path)
    place = SingleDeviceSharding(jax.devices()[0])
    loaded = mbx.from_pretrained(tmp_path, sharding=place)
    assert_same(loaded, model)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {place}


@pytest.mark.usefixtures("as_users_run")
def test_function_must_return_shardings(tmp_path: Path):
    mbx.save_pretrained(make(BOTH["tied"]), tmp_path)
    with pytest.raises(ValueError, match=r"for 'embedding.weight' returned 'cpu'"):
        mbx.from_pretrained(
            tmp_path,
            sharding=lambda *_: "cpu",  # pyright: ignore[reportArgumentType]
        )
