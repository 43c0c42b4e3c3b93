"""Hostile and damaged archives of `torch.save`, each with a part of the error it should raise."""

import io
import zipfile

import numpy as np

from tests.support import torch_files as tf


# The smallest file with a matrix, its transpose, a tied name and a second dtype.
SOURCE = tf.storage("FloatStorage", "0", 6)
HALF = tf.storage("HalfStorage", "1", 2)
ITEMS = {
    "w": tf.tensor(SOURCE, (2, 3), (3, 1)),
    "t": tf.tensor(SOURCE, (3, 2), (1, 3)),
    "p": tf.parameter(tf.tensor(SOURCE, (6,), (1,))),
    "h": tf.tensor(HALF, (), (), offset=1),
}
STORAGES = {
    "0": np.arange(6, dtype="<f4").tobytes(),
    "1": np.array([1, 2], dtype="<f2").tobytes(),
}


def small(pickle: bytes = tf.program(tf.state_dict(ITEMS)), **options) -> bytes:
    return tf.zip_bytes(tf.archive_entries(pickle, STORAGES, **options))


def holding(value: bytes) -> bytes:
    """Returns a file whose state dict has the single name `x` for the value that is pushed."""
    return small(tf.program(tf.state_dict({"x": value})))


SYSTEM = tf.function("os", "system")
TENSOR = tf.function("torch._utils", "_rebuild_tensor_v2")

PICKLES = {
    "os.system": (tf.program(tf.call(SYSTEM, tf.text("false"))), "os.system"),
    "os.system as a value": (tf.program(tf.state_dict({"x": SYSTEM})), "os.system` for 'x'"),
    "eval": (tf.program(tf.call(tf.function("builtins", "eval"), tf.text("1"))), "builtins.eval"),
    "global in two dots": (tf.program(tf.function("torch", "os.system")), "torch.os.system"),
    "long global": (tf.program(b"c" + b"a" * 1000 + b"\nb\n"), "without a name"),
    "global without end": (b"\x80\x02cos\nsystem", "without a name"),
    "global after a newline": (b"\x80\x02\nc", "not supported"),
    "inst": (b"\x80\x02(X\1\0\0\0xios\nsystem\n.", "INST"),
    "stack_global": (b"\x80\x02X\2\0\0\0osX\6\0\0\0system\x93.", "STACK_GLOBAL"),
    "obj": (b"\x80\x02(o.", "OBJ"),
    "newobj": (tf.program(tf.function("collections", "OrderedDict") + b")\x81"), "NEWOBJ"),
    "ext1": (b"\x80\x02\x82\x01.", "EXT1"),
    "persid": (b"\x80\x02Pabc\n.", "PERSID"),
    "frame": (b"\x80\x02\x95" + b"\xff" * 8 + b".", "FRAME"),
    "binbytes8": (b"\x80\x02\x8e" + b"\xff" * 8 + b".", "BINBYTES8"),
    "long4": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "LONG4"),
    "decimal integer": (b"\x80\x02I" + b"9" * 9999 + b"\n.", "INT"),
    "no instruction": (b"\x80\x02\xf0.", "xf0"),
    "protocol 4": (b"\x80\x04}.", "protocol 2"),
    "build on a function": (tf.program(TENSOR + b"}b"), "attributes of a value"),
    "build on a dict": (tf.program(b"}}b"), "attributes of a value"),
    "build on a tensor": (tf.program(ITEMS["w"] + b"}b"), "attributes of a value"),
    "build with a tuple": (tf.program(tf.ordered_dict() + b")b"), "not a dict"),
    "call of a value": (tf.program(b"})R"), "not a function"),
    "call of a storage class": (tf.program(tf.call(tf.function("torch", "LongStorage"))), "calls"),
    "call with a list": (tf.program(tf.function("collections", "OrderedDict") + b"]R"), "not a f"),
    "filled OrderedDict": (
        tf.program(tf.call(tf.function("collections", "OrderedDict"), b"]")),
        "arguments",
    ),
    "empty": (b"", "ends early"),
    "nothing": (tf.START + tf.STOP, "stops"),
    "two values": (tf.program(b"}}"), "stops"),
    "an open mark": (tf.program(b"(}"), "stops"),
    "more after the end": (tf.program(b"}") + b"}", "stops"),
    "no end": (tf.START + b"}", "ends early"),
    "text past the end": (b"\x80\x02X\xff\xff\xff\xff.", "ends early"),
    "text not UTF-8": (b"\x80\x02X\1\0\0\0\xff.", "UTF-8"),
    "a surrogate": (b"\x80\x02X\3\0\0\0\xed\xa0\x80.", "UTF-8"),
    "huge integer": (b"\x80\x02\x8a\x09" + b"\xff" * 9 + b".", "64 bits"),
    "unknown memo": (b"\x80\x02h\0.", "not stored"),
    "memo of nothing": (b"\x80\x02q\0.", "empty stack"),
    "empty stack": (b"\x80\x02R.", "empty stack"),
    "tuple of nothing": (b"\x80\x02\x87.", "empty stack"),
    "tuple without a mark": (b"\x80\x02t.", "mark"),
    "append to a dict": (b"\x80\x02}Na.", "not a list"),
    "items of a list": (b"\x80\x02]NNs.", "not a dict"),
    "odd items": (b"\x80\x02}(Nu.", "not a dict"),
    "deep marks": (tf.START + b"(" * 1_000_000, "deeply"),
    "deep dicts": (tf.START + b"}K\0" * 100_000, "deeply"),
    "deep tuples": (tf.program(b")" + b"\x85" * 200_000), "tuple"),
    "deep tuples in metadata": (
        tf.program(tf.ordered_dict() + b"}N)" + b"\x85" * 300_000 + b"sb"),
        "instructions",
    ),
    "a list in itself": (tf.program(b"]q\0h\0a"), "list"),
    "a dict in itself": (tf.program(b"}q\0X\1\0\0\0xh\0s"), "a dict under 'x'"),
    "doubling": (tf.program(b")" + b"q\0h\0\x86" * 80_000), "tuple"),
    "wide doubling": (tf.program(b"()q\0" + b"h\0" * 5000 + b"t"), "tuple"),
    "a long pickle": (tf.START + b"N" * 2**22, "data.pkl has"),
    "a list": (tf.program(b"]"), "list"),
    "a tensor": (tf.program(ITEMS["w"]), "a tensor, not a state dict"),
    "a storage": (tf.program(SOURCE), "storage"),
    "a number for a name": (tf.program(b"}K\1" + ITEMS["w"] + b"s"), "type int for a name"),
    "a name twice": (tf.program(b"}" + (tf.text("x") + ITEMS["w"] + b"s") * 2), "'x' twice"),
    "a number": (tf.program(tf.state_dict({**ITEMS, "epoch": b"K\1"})), "type int under 'epoch'"),
    "a name with control characters": (
        tf.program(tf.state_dict({"\x1b[2J" + "a" * 9999: b"N"})),
        r"None under '\\x1b\[2Jaaa",
    ),
    "a whole module": (
        tf.program(tf.function("torch.nn.modules.linear", "Linear") + b")\x81}b"),
        "whole object, made by `torch.nn.modules.linear.Linear`",
    ),
    "a trainer's": (
        tf.program(tf.state_dict({"epoch": b"K\1", "net": tf.state_dict(ITEMS)}, ordered=False)),
        r"under 'net'.*torch\.load\(path\)\['net'\]",
    ),
    "a trainer's with a class": (
        tf.program(
            tf.state_dict(
                {
                    "epoch": b"K\1",
                    "args": tf.function("argparse", "Namespace") + b")\x81",
                    "state_dict": tf.state_dict(ITEMS),
                },
                ordered=False,
            )
        ),
        "argparse.Namespace` for 'args'.*under 'state_dict'",
    ),
}

VALUES = {
    "float8": (
        tf.tensor(tf.storage("UntypedStorage", "0", 24), (1,), (1,), dtype="float8_e4m3fn"),
        "float8",
    ),
    "complex": (tf.storage("ComplexFloatStorage", "0", 3), "ComplexFloatStorage"),
    "quantised": (tf.storage("QInt8Storage", "0", 24), "QInt8Storage"),
    "sparse": (tf.function("torch._utils", "_rebuild_sparse_tensor"), "_rebuild_sparse_tensor"),
    "negated": (ITEMS["w"][:-2] + b"}" + tf.text("neg") + b"\x88stR", "resolve_neg"),
    "2**40 from one": (tf.tensor(SOURCE, (2**20, 2**20), (0, 0)), "expanded"),
    "7 from six": (tf.tensor(SOURCE, (7,), (0,)), "expanded"),
    "overlapping windows": (tf.tensor(SOURCE, (3, 4), (1, 1)), "expanded"),
    "past the end": (tf.tensor(SOURCE, (2, 3), (3, 1), offset=1), "past"),
    "stride past the end": (tf.tensor(SOURCE, (2,), (6,)), "past"),
    "scalar past the end": (tf.tensor(SOURCE, (), (), offset=6), "past"),
    "negative offset": (tf.tensor(SOURCE, (1,), (1,), offset=-1), "offset"),
    "negative size": (tf.tensor(SOURCE, (-1,), (1,)), "shape"),
    "two negative sizes": (tf.tensor(SOURCE, (-2, -3), (3, 1)), "shape"),
    "negative stride": (tf.tensor(SOURCE, (6,), (-1,), offset=5), "strides"),
    "overflow": (tf.tensor(SOURCE, (2**33, 2**33), (0, 0)), "overflows"),
    "overflow to 0": (tf.tensor(SOURCE, (2**62, 4), (0, 0)), "overflows"),
    "overflow beside 0": (tf.tensor(SOURCE, (0, 2**62, 2**62), (0, 0, 0)), "overflows"),
    "64-bit offset": (tf.tensor(SOURCE, (1,), (1,), offset=2**62), "past"),
    "33 dimensions": (tf.tensor(SOURCE, (1,) * 33, (1,) * 33), "dimensions"),
    "too few strides": (tf.tensor(SOURCE, (2, 3), (1,)), "strides"),
    "bool size": (ITEMS["w"].replace(b"(K\x02K\x03t", b"(\x88K\x03t"), "shape"),
    "bool offset": (ITEMS["w"].replace(b"QK\0", b"Q\x89"), "offset"),
    "text size": (ITEMS["w"].replace(b"(K\x02K\x03t", b"(NK\x03t"), "shape"),
    "list size": (ITEMS["w"].replace(b"(K\x02K\x03t", b"]"), "torch does not"),
    "no storage": (ITEMS["w"].replace(SOURCE, b"N"), "torch does not"),
    "no arguments": (tf.call(TENSOR), "torch does not"),
    "untyped without a dtype": (
        tf.tensor(tf.storage("UntypedStorage", "0", 24), (1,), (1,)),
        "dtype",
    ),
    "a class for a dtype": (tf.tensor(SOURCE, (1,), (1,), dtype="FloatStorage"), "dtype"),
    "parameter of nothing": (tf.parameter(b"N"), "arguments"),
    "missing storage": (tf.storage("FloatStorage", "9", 6), "missing"),
    "storage by path": (tf.storage("FloatStorage", "../data/0", 6), "missing"),
    "larger storage": (tf.storage("FloatStorage", "0", 7), "24 bytes"),
    "smaller storage": (tf.storage("FloatStorage", "0", 5), "24 bytes"),
    "negative storage": (tf.storage("FloatStorage", "0", -6), "24 bytes"),
    "storage of no class": (
        SOURCE.replace(b"torch\nFloatStorage", b"torch\nuint16"),
        "as a storage",
    ),
    "storage of another kind": (tf.sequence(tf.text("module")) + b"Q", "other than a storage"),
    "storage of a tuple": (b")Q", "other than a storage"),
    "storage of a number": (b"K\1Q", "other than a storage"),
}

TENSORS = tf.archive_entries(tf.program(tf.state_dict(ITEMS)), STORAGES)


def entry_named(name: str, data: bytes = b"") -> bytes:
    return tf.zip_bytes([*TENSORS, tf.Entry(name, data)])


def deflated(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for entry in TENSORS:
            archive.writestr(entry.name, entry.data)
    return file.getvalue()


def with_storage(**options) -> bytes:
    entries = list(TENSORS)
    entries[2] = tf.Entry("archive/data/0", STORAGES["0"], **options)
    return tf.zip_bytes(entries)


ARCHIVES = {
    "empty": (b"", "empty"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "XML": (b"<?xml version='1.0'?><Error/>", "web page"),
    "git-LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "JSON": (b'{"error": "not found"}', "neither"),
    "safetensors": (b"\x02\0\0\0\0\0\0\0{}", "safetensors"),
    "legacy": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "legacy"),
    "legacy tar": (b"sys_info".ljust(257, b"\0") + b"ustar\x0000", "legacy"),
    "bare pickle": (tf.program(b"}"), "bare pickle"),
    "zeros": (bytes(1000), "neither"),
    "deflated": (deflated(zipfile.ZIP_DEFLATED), "compressed"),
    "lzma": (deflated(zipfile.ZIP_LZMA), "compressed"),
    "deflated in one header": (with_storage(method=8), "compressed"),
    "encrypted": (with_storage(flags=0x809), "encrypted"),
    "name twice": (entry_named("archive/data/0"), "twice"),
    "pickle twice": (entry_named("archive/data.pkl", tf.program(b"}")), "twice"),
    "two roots": (entry_named("other/data/0"), "one folder"),
    "no pickle": (tf.zip_bytes(TENSORS[1:]), "data.pkl"),
    "no entries": (tf.zip_bytes([]), "neither"),
    "TorchScript": (entry_named("archive/code/__torch__.py"), "TorchScript"),
    "TorchScript constants": (entry_named("archive/constants.pkl"), "TorchScript"),
    "parent path": (entry_named("archive/../../etc/passwd"), "do not trust"),
    "absolute path": (entry_named("/etc/passwd"), "do not trust"),
    "backslash": (entry_named("archive\\..\\x"), "do not trust"),
    "zero byte": (entry_named("archive/x\0y"), "do not trust"),
    "folder": (entry_named("archive/x/"), "do not trust"),
    "another local name": (with_storage(local_name="archive/data/1"), "no matching header"),
    "overlap": (with_storage(size=200), "overlap"),
    "overlap by offset": (
        with_storage(offset=0, local_name="archive/data/0"),
        "no matching header",
    ),
    "past the end": (with_storage(size=10**6), "overlap"),
    "past 2**32": (with_storage(size=2**40), "overlap"),
    "size of 2**64 - 1": (with_storage(size=2**64 - 1), "overlap"),
    "offset past the end": (with_storage(offset=10**6), "no matching header"),
    "offset of 2**64 - 1": (with_storage(offset=2**64 - 1), "no matching header"),
    "zip64 missing": (
        small().replace(b"\x18\0\0\0\x18\0\0\0\x0e\0", b"\xff\xff\xff\xff\xff\xff\xff\xff\x0e\0"),
        "zip64",
    ),
    "comment": (small()[:-2] + b"\1\0!", "does not end"),
    "more entries than there are": (small()[:-14] + b"\x06\0\x06\0" + small()[-10:], "ends early"),
    "fewer entries": (small()[:-14] + b"\x04\0\x04\0" + small()[-10:], "longer"),
    "in two parts": (small()[:-18] + b"\1\0" + small()[-16:], "end record"),
    "prepended": (b"PK\3\4" + small(), "end record"),
    "byteorder": (small(byteorder="middle"), "byteorder"),
    "long byteorder": (small(byteorder="little" * 100), "byteorder"),
    "checksum": (small(crc=1), "checksum"),
    "storage of 2**64 bytes": (
        tf.zip_bytes(tf.archive_entries(TENSORS[0].data, {"0": b"", "1": b""})),
        "storage '0' has 0 bytes",
    ),
}
