"""Damaged and hostile token files raise the documented errors."""

import lzma
import os

import numpy as np
import pytest

from mamba_eqx import training
from mamba_eqx.training.data import _token_files
from tests.support.bounded import bounded


PACKED = lzma.compress(b"to be or not to be")


def npy(header, data=bytes(10), version=b"\1\0"):
    text = header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def fields(shape="(5,)", descr="'<u2'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


DAMAGED = {
    "cut.xz": (PACKED[:-3], "incomplete"),
    "head.xz": (PACKED[:5], "incomplete"),
    "text.xz": (b"text", "not a valid .xz file"),
    "flipped.xz": (PACKED[:30] + bytes([PACKED[30] ^ 1]) + PACKED[31:], "not a valid .xz file"),
    "tail.xz": (PACKED + b"tail", "not a valid .xz file"),
    "cut_second.xz": (PACKED + PACKED[:-9], "incomplete"),
    "short.npy": (b"PK", "not a valid .npy file"),
    "zip.npy": (b"PK\3\4" + bytes(40), "not a valid .npy file"),
    "pickle.npy": (b"\x80\x02}q\0.", "not a valid .npy file"),
    "version.npy": (npy(fields(), version=b"\7\0"), "not a valid .npy file"),
    "brackets.npy": (npy("{'descr': " + "(" * 300), "not a valid .npy file"),
    "many_brackets.npy": (npy("[" * 9000), "not a valid .npy file"),
    "object.npy": (npy(fields(descr="'|O'")), "not a valid .npy file"),
    "code.npy": (npy("__import__('os').abort()"), "not a valid .npy file"),
    "longer.npy": (npy(fields("(6,)")), "not a valid .npy file"),
    "huge.npy": (npy(fields(f"({2**62},)")), "not a valid .npy file"),
    "overflow.npy": (npy(fields(f"({10**30},)")), "not a valid .npy file"),
    "negative.npy": (npy(fields("(-1,)")), "not a valid .npy file"),
    "records.npy": (npy(fields(descr="[('a', '<u2')]")), "one-dimensional array of integers"),
    "matrix.npy": (npy(fields("(1, 5)")), "one-dimensional array of integers"),
    "scalar.npy": (npy(fields("()")), "one-dimensional array of integers"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_raises(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with bounded(), pytest.raises(ValueError, match=rf"{name}.* {message}") as caught:
        training.read_tokens(tmp_path / name)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 500


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes and devices")
@pytest.mark.parametrize("end", ["", ".npy", ".xz"])
def test_irregular_file_raises(tmp_path, end):
    path = tmp_path / f"x{end}"
    os.mkfifo(path)
    with bounded(), pytest.raises(ValueError, match=r"x.*: it is not a regular file"):
        training.read_tokens(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with bounded(), pytest.raises(ValueError, match=r"x.*: it is not a regular file"):
        training.read_tokens(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"x.*: it is a folder"):
        training.read_tokens(path)


def test_reads_what_other_programs_write(tmp_path):
    """Several streams with padding, `.lzma`, other byte orders, and bytes behind the array."""
    for content, want in {
        PACKED + PACKED: 36,
        PACKED + bytes(8) + PACKED + bytes(4): 36,
        lzma.compress(b"to be", format=lzma.FORMAT_ALONE): 5,
    }.items():
        (tmp_path / "x.xz").write_bytes(content)
        assert len(training.read_tokens(tmp_path / "x.xz")) == want
    for content in (npy(fields()), npy(fields(), bytes(13)), npy(fields(descr="'>i2'"))):
        (tmp_path / "x.npy").write_bytes(content)
        assert training.read_tokens(tmp_path / "x.npy").tolist() == [0] * 5


def test_file_that_unpacks_to_far_more_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(_token_files, "_MAX_SMALL", 1000)
    (tmp_path / "x.xz").write_bytes(lzma.compress(bytes(1000)))
    assert np.array_equal(training.read_tokens(tmp_path / "x.xz"), np.zeros(1000))
    for content in (lzma.compress(bytes(10**6)), lzma.compress(bytes(700)) * 2):
        monkeypatch.setattr(_token_files, "_MAX_RATIO", 5)
        (tmp_path / "x.xz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.xz must unpack to at most 5 times its own"):
            training.read_tokens(tmp_path / "x.xz")
