"""Loading needs memory for one tensor besides the model, and damaged checkpoints are refused."""

import json
import os
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.formats.torch._state_dict import open_torch
from mamba_eqx.pretrained import CheckpointError, from_pretrained, save_pretrained, state_dict
from tests.support import torch_files as tf
from tests.support.bounded import bounded
from tests.support.checkpoints import BOTH, assert_same, config, make


# 12 layers, each with a matrix of 1 MB and others.
LARGE = config(
    mbx.Mamba1Config(d_model=256, d_inner=512, d_state=4), n_layer=12, tie_embeddings=False
)
MATRIX = 2 * 512 * 256 * 4


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Returns a folder with the same model in both formats."""
    folder = tmp_path_factory.mktemp("large")
    model = make(LARGE)
    save_pretrained(model, folder / "safetensors", layout="state-spaces")
    arrays = {k: np.asarray(v) for k, v in state_dict(model, layout="state-spaces").items()}
    (folder / "bin").mkdir()
    (folder / "bin" / "pytorch_model.bin").write_bytes(tf.torch_bytes(arrays))
    text = (folder / "safetensors" / "config.json").read_text()
    (folder / "bin" / "config.json").write_text(text)
    return folder


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("dtype", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("bin", marks=pytest.mark.slow)])
def test_at_most_one_tensor_is_in_memory_besides_the_model(kind, dtype, large):
    from_pretrained(large / kind, dtype=dtype)  # Memory that is allocated only once does not count.
    tracemalloc.start()
    try:
        model = from_pretrained(large / kind, dtype=dtype)
        jax.block_until_ready(model)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert size > (10 if dtype is None else 5) * MATRIX
    assert peak - left < 2 * MATRIX


@pytest.mark.usefixtures("as_users_run")
def test_opening_does_not_read_tensors(large):
    files = {
        open_torch: large / "bin" / "pytorch_model.bin",
        open_safetensors: large / "safetensors" / "model.safetensors",
    }
    for open_file, path in files.items():
        open_file(path)
        tracemalloc.start()
        try:
            tensors = open_file(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(tensors) > 100
        assert path.stat().st_size > 10 * MATRIX
        assert peak < MATRIX
        with bounded():
            open_file(path)


# Damaged files.


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Returns a function that loads the model after changing one of its files."""
    folder = tmp_path_factory.mktemp("damaged")
    model = make(BOTH["tied"])
    save_pretrained(model, folder)
    original = {path.name: path.read_bytes() for path in folder.iterdir()}

    def load(name, data, others=()):
        for file in folder.iterdir():
            file.unlink()
        for file, content in (original | {name: data} | dict(others)).items():
            if content is not None:
                (folder / file).write_bytes(content)
        return from_pretrained(folder)

    return load, original, model


FLIPS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 7)), min_size=1, max_size=3)


@pytest.mark.usefixtures("as_users_run")
@settings(max_examples=max(30, settings().max_examples))
@given(flips=FLIPS)
def test_flipped_bits_in_header_never_change_the_model(damaged, flips):
    load, original, model = damaged
    data = bytearray(original["model.safetensors"])
    header = 8 + int.from_bytes(data[:8], "little")
    for position, bit in flips:
        data[position % header] ^= 1 << bit
    try:
        loaded = load("model.safetensors", bytes(data))
    except CheckpointError:
        return
    assert_same(loaded, model)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_content_in_place_of_a_file_raises(name, damaged):
    load, original, _ = damaged
    whole = original[name]
    for data, word in [
        (b"", "empty|JSON"),
        (b"<!DOCTYPE html><html>Log in</html>", "web page|JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "LFS|JSON"),
        (b"\0" * len(whole), "."),
        (whole[: len(whole) // 2], "."),
        (whole[:-2], "."),
        (whole + b"x", "."),
        (b"null", "."),
        (json.dumps([1]).encode(), "."),
    ]:
        with bounded(), pytest.raises(CheckpointError, match=f"{name}.*({word})"):
            load(name, data)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("kind", ["lists", "keys"])
def test_large_json_is_refused_quickly(kind, damaged):
    load, _, _ = damaged
    others = {"model.safetensors": None}
    for name, limit in (("config.json", 2**18), ("model.safetensors.index.json", 2**21)):
        if kind == "lists":
            text = b"[" + b"[]," * (limit // 3 - 1) + b"0]"
        else:
            # Only the last key is a duplicate, which takes quadratic time to find naively.
            text = b"{" + b"".join(b'"%x":0,' % i for i in range(limit // 11)) + b'"1":0}'
        for size, word in ((limit, "JSON object|weight_map|occurs twice"), (limit + 1, "at most")):
            with bounded(), pytest.raises(CheckpointError, match=f"{name}.*({word})"):
                load(name, text.ljust(size), others)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_irregular_files_raise(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: it is not a regular file"):
        from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="regular"):
        open_torch(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is a folder"):
        open_torch(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_torch(tmp_path / "absent.bin")


def test_safetensors_package_needs_contiguous_arrays(tmp_path):
    """Documents why we copy: the package writes wrong values for other arrays."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    safetensors.numpy.save_file({"x": array}, tmp_path / "theirs")
    theirs = open_safetensors(tmp_path / "theirs")["x"].read()
    if safetensors.__version__ == "0.8.0":
        assert not np.array_equal(theirs, array)
    write_safetensors(tmp_path / "ours", {"x": array}, {})
    assert np.array_equal(open_safetensors(tmp_path / "ours")["x"].read(), array)
