"""Reading and writing safetensors files; damaged files raise a `CheckpointError`."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings, strategies as st

from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.formats._tensors import CheckpointError
from tests.support import torch_files as tf
from tests.support.bounded import bounded
from tests.support.tensors import Opener, check_readable, opener


ARRAYS = {
    name: np.array([[0, 1, 2], [3, 100, 1]]).astype(dtype) for name, dtype in tf.DTYPES.items()
}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def field(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opener:
    return opener(open_safetensors, tmp_path_factory.mktemp("safetensors") / "model.safetensors")


# Reading and writing.


def test_reads_files_of_the_package(opened):
    arrays = {**ARRAYS, "scalar": np.array(3.0), "empty": np.ones((0, 3)), "one": np.ones((1, 1))}
    tensors = opened(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
    check_readable(tensors, 48)
    assert sorted(tensors) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_package_reads_our_files(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = {**ARRAYS, "scalar": np.array(3.0), "empty": np.ones((0, 3))}
    write_safetensors(path, arrays, {"format": "pt"})
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(arrays)
    for name, stored in open_safetensors(path).items():
        np.testing.assert_array_equal(stored.read(), arrays[name], strict=True)
    del arrays["bfloat16"]  # The package reads bfloat16 with torch only.
    write_safetensors(path, arrays, {})
    for name, array in safetensors.numpy.load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


def test_writes_arrays_of_any_memory_layout(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {
        "transposed": base.T,
        "fortran": np.asfortranarray(base),
        "strided": base[:, ::2, 1],
        "reversed": base[::-1],
        "expanded": np.broadcast_to(np.float32(1), (3, 2)),
        "big-endian": base.astype(">f4"),
        "scalar view": base[1, 2, 3, ...],
        "bfloat16": base.astype(tf.DTYPES["bfloat16"]).T,
    }
    write_safetensors(tmp_path / "model.safetensors", arrays, {})
    tensors = open_safetensors(tmp_path / "model.safetensors")
    check_readable(tensors, 96)
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name].read(), array)


def test_failed_write_leaves_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"old": np.ones(2)}, {})
    mode = path.stat().st_mode
    plain = tmp_path / "plain"
    plain.touch()
    assert mode == plain.stat().st_mode  # Not the 0600 of a temporary file.
    plain.unlink()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            write_safetensors(path, {"new": np.ones(2)}, {})
    for bad in ({"x": np.ones(2, np.complex64)}, {"__metadata__": np.ones(2)}):
        with pytest.raises(ValueError, match=r"__metadata__|complex64"):
            write_safetensors(path, bad, {})
    assert list(open_safetensors(path)) == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_write_does_not_change_an_open_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": np.zeros(1000)}, {})
    before = open_safetensors(path)["x"].read()
    write_safetensors(path, {"x": before + 1}, {})
    assert before.sum() == 0
    assert open_safetensors(path)["x"].read().sum() == 1000


def test_reads_all_valid_forms(opened):
    assert opened(file_bytes({})) == {}
    assert opened(file_bytes({"__metadata__": {"a": "b"}})) == {}
    # A header of 60 bytes begins with "<", as a web page does.
    header = json.dumps({"x": field()}, separators=(",", ":")).encode().ljust(60)
    assert file_bytes(header)[:1] == b"<"
    assert opened(file_bytes(header, bytes(8)))["x"].read().tolist() == [0, 0]
    # Tensors have the order of the header. Their data may be anywhere, aligned or not.
    a, b, e = field("BOOL", [1], 0, 1), field("F32", [2], 1, 9), field("I8", [0], 9, 9)
    header = {"b": b, "a": a, "e": e}
    tensors = opened(file_bytes(header, b"\x07" + struct.pack("<2f", 1, 2)))
    assert list(tensors) == ["b", "a", "e"]
    check_readable(tensors, 8)
    assert tensors["b"].read().tolist() == [1, 2]
    assert tensors["a"].read().view(np.uint8).tolist() == [1]


# Invalid files.


def one(**options: object) -> bytes:
    return file_bytes({"x": field(**options)}, bytes(8))


def described(**changes: object) -> bytes:
    return file_bytes({"x": {**field(), **changes}}, bytes(8))


REFUSED = {
    "empty": (b"", "empty"),
    "short": (b"\x02\0\0\0", "incomplete"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "web page": (b"<!doctype html><html>", "web page"),
    "JSON": (b'{"error": "not found"}', "not a safetensors file"),
    "torch": (tf.torch_bytes({"x": np.ones(2)}), "zip archive"),
    "header past the end": (struct.pack("<Q", 3) + b"{}", "incomplete"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "incomplete"),
    "header of 9 MB": (file_bytes(b"{}".ljust(9_000_000)), "at most"),
    "no header": (file_bytes(b""), "JSON"),
    "not JSON": (file_bytes(b"{'x': 1}"), "JSON"),
    "two values": (file_bytes(b"{}{}"), "JSON"),
    "a list": (file_bytes(b"[]"), "JSON object"),
    "spaces first": (file_bytes(b" {}"), "JSON object"),
    "UTF-16": (file_bytes("{}".encode("utf-16")), "JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "JSON"),
    "a surrogate": (file_bytes(b'{"\\ud800": 1}'), "JSON"),
    "deep lists": (file_bytes(b'{"x":' + b"[" * 100_000), "JSON"),
    "deep objects": (file_bytes(b'{"x":' * 100_000), "JSON"),
    "NaN": (file_bytes(b'{"x": NaN}'), "number"),
    "a float": (one(begin=0.0), "number"),
    "a long number": (file_bytes(b'{"x": ' + b"9" * 100_000 + b"}"), "number"),
    "a name twice": (
        file_bytes(b'{"x": %b, "x": %b}' % ((json.dumps(field()).encode(),) * 2), bytes(8)),
        "'x' occurs twice",
    ),
    "a field twice": (
        file_bytes(b'{"x":{"dtype":"F32","dtype":"F32"}}'),
        "'dtype' occurs twice",
    ),
    "metadata twice": (file_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "occurs twice"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "strings"),
    "metadata of None": (file_bytes({"__metadata__": None}), "strings"),
    "tensor of None": (file_bytes({"x": None}), "fields"),
    "a field too many": (described(strides=[1]), "fields"),
    "a field too few": (file_bytes({"x": {"dtype": "F32", "shape": [2]}}), "fields"),
    "float8": (one(dtype="F8_E4M3"), "float8"),
    "float4": (one(dtype="F4"), "float8"),
    "complex": (one(dtype="C64"), "C64"),
    "unknown dtype": (one(dtype="f32"), "not one of"),
    "dtype of a list": (one(dtype=["F32"]), "string"),
    "shape of None": (one(shape=None), "list"),
    "negative size": (one(shape=[-2]), "shape"),
    "negative sizes": (one(shape=[-2, -1]), "shape"),
    "bool size": (one(shape=[True, 2]), "shape"),
    "text size": (one(shape=["2"]), "shape"),
    "33 dimensions": (one(shape=[1] * 32 + [2]), "dimensions"),
    "overflow": (one(shape=[2**33, 2**33]), "overflow"),
    "overflow to 2": (one(shape=[2**63 + 1, 2]), "overflow"),
    "overflow beside 0": (one(shape=[0, 2**62, 2**62], end=0), "overflow"),
    "larger shape": (one(shape=[3]), "12 bytes"),
    "smaller shape": (one(shape=[1]), "4 bytes"),
    "reversed offsets": (one(begin=8, end=0), "hold -8"),
    "negative offsets": (one(begin=-8, end=0), "data_offsets"),
    "three offsets": (described(data_offsets=[0, 8, 8]), "data_offsets"),
    "offsets of an object": (described(data_offsets={}), "data_offsets"),
    "past the end": (one(shape=[4], end=16), "16 bytes"),
    "a gap first": (one(shape=[1], begin=4), "gap"),
    "a gap last": (one(shape=[1], end=4), "8 bytes of data"),
    "a gap between": (
        file_bytes({"a": field("U8", [1], 0, 1), "b": field("U8", [1], 2, 3)}, bytes(3)),
        "'b'.*gap",
    ),
    "overlap": (
        file_bytes({"a": field("U8", [2], 0, 2), "b": field("U8", [2], 1, 3)}, bytes(3)),
        "'b'.*overlaps",
    ),
    "twice the same bytes": (file_bytes({"a": field(), "b": field()}, bytes(8)), "overlaps"),
    "control characters": (
        file_bytes({"\x1b[2J" + "a" * 9999: field(shape=[-1])}, bytes(8)),
        r"'\\x1b\[2Jaaa",
    ),
}


@pytest.mark.parametrize(("data", "word"), REFUSED.values(), ids=REFUSED)
def test_invalid_file_raises(opened, data, word):
    with (
        bounded(),
        pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{word}") as caught,
    ):
        opened(data)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":[' + b"{}," * 100_000 + b"0]}",
        b"{" + b",".join(b'"%d":[]' % i for i in range(20_000)) + b"}",
    ],
    ids=["objects", "names"],
)
def test_memory_is_bounded(opened, header):
    data = file_bytes(header)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            opened(data)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40 * len(data)


SMALL = safetensors.numpy.save({"x": np.ones((2, 3), np.float32), "y": np.ones(2, np.int8)})


def test_truncated_file_raises(opened):
    for length in range(len(SMALL)):
        with pytest.raises(CheckpointError):
            opened(SMALL[:length])


@settings(max_examples=max(100, settings().max_examples))
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 7)), min_size=1, max_size=3))
def test_flipped_bits_raise_or_are_harmless(opened, flips):
    data = bytearray(SMALL)
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    try:
        tensors = opened(bytes(data))
    except CheckpointError:
        return
    check_readable(tensors, len(data))


def test_changed_bytes_of_the_header_raise_or_are_harmless(opened):
    for position in range(len(SMALL) - 26):
        for byte in b'\x00\xff"{}[],:-09eu':
            try:
                tensors = opened(SMALL[:position] + bytes([byte]) + SMALL[position + 1 :])
            except CheckpointError:
                continue
            check_readable(tensors, len(SMALL))


@pytest.mark.parity
def test_parity_with_the_package(opened, tmp_path):
    torch = pytest.importorskip("torch")
    files = pytest.importorskip("safetensors.torch")
    state = {
        name: torch.tensor([[0, 1, 2], [3, 100, 1]]).to(getattr(torch, name)) for name in ARRAYS
    }
    tensors = opened(files.save(state, metadata={"format": "pt"}))
    assert sorted(tensors) == sorted(state)
    for name, stored in tensors.items():
        np.testing.assert_array_equal(stored.read(), ARRAYS[name], strict=True)
    write_safetensors(tmp_path / "x.safetensors", ARRAYS, {"format": "pt"})
    for name, tensor in files.load_file(tmp_path / "x.safetensors").items():
        assert tensor.dtype == state[name].dtype
        assert tensor.tolist() == state[name].tolist()
