"""Reading the files of `torch.save`; hostile files only raise a `CheckpointError`."""

import collections
import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mamba_eqx.formats._tensors import CheckpointError
from mamba_eqx.formats.torch._state_dict import open_torch
from tests.support import torch_files as tf
from tests.support.bounded import bounded
from tests.support.tensors import Opener, check_readable, opener
from tests.support.torch_attacks import (
    ARCHIVES,
    ITEMS,
    PICKLES,
    SOURCE,
    STORAGES,
    TENSOR,
    VALUES,
    holding,
    small,
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opener:
    return opener(open_torch, tmp_path_factory.mktemp("torch") / "pytorch_model.bin")


# Valid files.


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_reads_every_dtype(opened, byteorder):
    arrays = {
        name: np.array([[0, 1, 2], [3, 100, 1]]).astype(dtype) for name, dtype in tf.DTYPES.items()
    }
    tensors = opened(tf.torch_bytes(arrays, byteorder=byteorder))
    assert list(tensors) == list(arrays)
    check_readable(tensors, 48)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(), array, strict=True)


def test_reads_every_shape(opened):
    arrays = {str(s): np.ones(s, np.float32) for s in [(), (1,), (0,), (3, 0), (2, 1, 3, 1)]}
    tensors = opened(tf.torch_bytes(arrays))
    check_readable(tensors, 24)
    assert {name: stored.shape for name, stored in tensors.items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_views_of_one_storage_share_memory(opened):
    tensors = opened(small())
    check_readable(tensors, 24)
    w, t, p = (tensors[name].read() for name in "wtp")
    np.testing.assert_array_equal(w, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(t, w.T)
    assert tensors["h"].read() == 2
    assert np.shares_memory(w, p)
    assert not w.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        tf.tensor(tf.storage("FloatStorage", "0", 6, place="cuda:0"), (2,), (3,), offset=2),
        tf.tensor(SOURCE, (1, 2), (2**62, 3), offset=2),
        tf.tensor(SOURCE, (2,), (3,), offset=2)[:-2] + b"NtR",
        tf.tensor(SOURCE, (2,), (3,), offset=2)[:-2] + b"}tR",
        tf.call(
            tf.function("torch._utils", "_rebuild_parameter_with_state"),
            tf.tensor(SOURCE, (2,), (3,), offset=2),
            b"\x88",
            tf.ordered_dict(),
            b"}" + tf.text("_no_weight_decay") + b"\x88s",
        ),
    ],
    ids=["cuda", "unused stride", "metadata None", "metadata empty", "parameter with attributes"],
)
def test_reads_all_forms_of_a_tensor(opened, value):
    array = opened(holding(value))["x"].read()
    np.testing.assert_array_equal(array.ravel(), np.array([2, 5], np.float32))


def test_empty_tensor_may_be_beyond_the_end(opened):
    array = opened(holding(tf.tensor(SOURCE, (0, 3), (3, 1), offset=2**62)))["x"].read()
    assert array.shape == (0, 3)


def test_reads_all_forms_of_a_state_dict(opened):
    metadata = b"}" + tf.text("_metadata") + tf.state_dict({"": b"}" + tf.text("v") + b"K\1s"})
    plain = tf.state_dict(ITEMS, ordered=False)
    one_by_one = b"}" + b"".join(tf.text(name) + item + b"s" for name, item in ITEMS.items())
    for value in (tf.state_dict(ITEMS) + metadata + b"sb", plain, one_by_one):
        assert list(opened(small(tf.program(value)))) == list(ITEMS)
    assert opened(small(tf.program(tf.ordered_dict()))) == {}


def test_reads_all_forms_of_an_archive(opened):
    entries = tf.archive_entries(tf.program(tf.state_dict(ITEMS)), STORAGES)
    without_byteorder = [entry for entry in entries if "byteorder" not in entry.name]
    for data in (
        tf.zip_bytes(entries, zip64=True),
        tf.zip_bytes(without_byteorder),
        tf.zip_bytes(entries, alignment=1),  # Unaligned tensors.
        small(crc=0),  # `torch.serialization.set_crc32_options(False)`
    ):
        tensors = opened(data)
        check_readable(tensors, 24)
        np.testing.assert_array_equal(tensors["w"].read(), [[0, 1, 2], [3, 4, 5]])


def test_bools_are_zero_or_one(opened):
    pickle = tf.program(
        tf.state_dict({"x": tf.tensor(tf.storage("BoolStorage", "0", 3), (3,), (1,))})
    )
    data = tf.zip_bytes(tf.archive_entries(pickle, {"0": b"\0\x02\xff"}))
    assert opened(data)["x"].read().view(np.uint8).tolist() == [0, 1, 1]


# Hostile files.

ATTACKS = [
    *(pytest.param(small(d), word, id=f"pickle: {n}") for n, (d, word) in PICKLES.items()),
    *(pytest.param(holding(v), word, id=f"value: {n}") for n, (v, word) in VALUES.items()),
    *(pytest.param(data, word, id=f"archive: {n}") for n, (data, word) in ARCHIVES.items()),
]


@pytest.mark.parametrize(("data", "word"), ATTACKS)
def test_hostile_file_raises(opened, data, word):
    with (
        bounded(),
        pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{word}") as caught,
    ):
        opened(data)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_no_code_is_run(opened, tmp_path):
    for module in ("os", "posix", "nt"):
        attack = tf.call(tf.function(module, "system"), tf.text(f"touch {tmp_path / 'run'}"))
        for value in (attack, tf.state_dict({"x": attack}), tf.ordered_dict() + attack + b"b"):
            with pytest.raises(CheckpointError):
                opened(small(tf.program(value)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pickle",
    [
        tf.START + b"]q\0(" + b"}" * 9000 + b"e" + (b"(" + b"}" * 9000 + b"e") * 100,
        tf.START + b"}(" + b"".join(b"}r" + i.to_bytes(4, "little") for i in range(9000)) * 90,
        tf.program(
            b"}"
            + b"("
            + b"".join(
                tf.text(f"{i:05}") + (b"h\0" if i else ITEMS["w"] + b"q\0") for i in range(4000)
            )
            + b"u"
            + b"q\1"
            + b"("
            + b"".join(tf.text(f"k{i}") + b"h\0" for i in range(4000))
            + b"u"
        ),
    ],
    ids=["objects", "memo", "tensors"],
)
def test_memory_is_bounded(opened, pickle, monkeypatch):
    # A tenth of the actual limit, because tracing is slow.
    monkeypatch.setattr("mamba_eqx.formats.torch._pickle._MAX_INSTRUCTIONS", 25_000)
    data = small(pickle)
    tracemalloc.start()
    try:
        check_readable(opened(data), 24)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8e6


def test_large_dict_under_many_names_takes_linear_time(opened):
    """The search for a nested state dict must not search the same dict once for each name."""
    items = b"(" + b"".join(tf.text(str(i)) + b"h\0" for i in range(4900)) + b"u"
    large = b"}q\1(" + tf.text("t") + ITEMS["w"] + b"q\0u" + items * 10 + tf.text("z") + b"Ns"
    names = b"(" + b"".join(tf.text(f"m{i}") + b"h\1" for i in range(4900)) + b"u"
    with bounded(), pytest.raises(CheckpointError, match="a dict under 'm'"):
        opened(small(tf.program(b"}" + tf.text("m") + large + b"s" + names)))


# Damaged files.


def test_truncated_file_raises(opened):
    data = small()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            opened(data[:length])


def test_truncated_pickle_raises(opened):
    pickle = tf.program(tf.state_dict(ITEMS))
    for length in range(len(pickle)):
        with pytest.raises(CheckpointError):
            opened(small(pickle[:length]))


def check_damaged(opened, data: bytes) -> None:
    try:
        tensors = opened(data)
    except CheckpointError:
        return
    check_readable(tensors, len(data))


FLIPS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 7)), min_size=1, max_size=3)


@settings(max_examples=max(100, settings().max_examples))
@given(flips=FLIPS, crc=st.sampled_from([None, 0]), zip64=st.booleans())
def test_flipped_bits_raise_or_are_harmless(opened, flips, crc, zip64):
    pickle = tf.program(tf.state_dict(ITEMS))
    original = tf.zip_bytes(tf.archive_entries(pickle, STORAGES, crc=crc), zip64=zip64)
    data = bytearray(original)
    for position, bit in flips:
        data[position % len(data)] ^= 1 << bit
    check_damaged(opened, bytes(data))
    values = {byte for s in STORAGES.values() for byte in span(original, s)}
    if crc is None and values.isdisjoint(position % len(data) for position, _ in flips):
        # Everything except the values of tensors is validated or covered by a checksum.
        try:
            tensors = opened(bytes(data))
        except CheckpointError:
            return
        for name, stored in opened(original).items():
            np.testing.assert_array_equal(tensors.pop(name).read(), stored.read(), strict=True)
        assert not tensors


def span(data: bytes, part: bytes) -> range:
    start = data.index(part)
    return range(start, start + len(part))


def test_changed_bytes_of_the_pickle_raise_or_are_harmless(opened):
    """Each byte is replaced by instructions and by extreme values."""
    pickle = tf.program(tf.state_dict(ITEMS))
    for position in range(len(pickle)):
        for byte in (0, 0xFF, pickle[position] ^ 1, *b"(tR"):
            changed = pickle[:position] + bytes([byte]) + pickle[position + 1 :]
            check_damaged(opened, small(changed))


PARTS = st.sampled_from(
    [
        *(bytes([byte]) for byte in b"NbRQ()t]}aesu\x85\x86\x87\x88\x89."),
        *(b"q\0", b"h\0", b"q\1", b"h\1", b"K\1", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8),
        *(b"G" + b"\xff" * 8, tf.text("x"), tf.text("storage"), tf.text("0")),
        *(tf.function(*g) for g in [("torch", "FloatStorage"), ("torch", "uint16")]),
        *(SOURCE, ITEMS["w"], ITEMS["p"], TENSOR, tf.ordered_dict()),
    ]
)


@settings(max_examples=max(100, settings().max_examples))
@given(parts=st.lists(PARTS, max_size=12))
def test_random_programs_raise_or_are_harmless(opened, parts):
    check_damaged(opened, small(tf.program(b"".join(parts))))


# Files written by torch.


def saved(torch, value: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.mark.parity
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_reads_every_dtype_of_torch(opened, byteorder):
    torch = pytest.importorskip("torch")
    values = torch.tensor([[0, 1, 2], [3, 100, 1]])
    state = collections.OrderedDict((n, values.to(getattr(torch, n))) for n in tf.DTYPES)
    data = saved(torch, state)
    if byteorder == "big":  # torch cannot write big-endian files.
        data = tf.torch_bytes({n: s.read() for n, s in opened(data).items()}, byteorder="big")
        assert sorted(torch.load(io.BytesIO(data))) == sorted(state)
    tensors = opened(data)
    check_readable(tensors, 48)
    assert list(tensors) == list(state)
    for name, stored in tensors.items():
        assert stored.dtype == tf.DTYPES[name]
        np.testing.assert_array_equal(stored.read().astype(np.int64), state[name].long().numpy())


@pytest.mark.parity
def test_reads_views_of_torch(opened):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 5, 6)
    state = {
        "base": base,
        "tied": base,
        "transposed": base.transpose(0, 2),
        "sliced": base[1:, ::2, 3],
        "scalar": base[2, 3, 4],
        "empty": base[:, 2:2],
        "windows": torch.arange(10).unfold(0, 2, 2),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    tensors = opened(saved(torch, state))
    check_readable(tensors, base.numel() * 4)
    for name, value in state.items():
        np.testing.assert_array_equal(tensors[name].read(), value.detach().numpy(), strict=True)
    assert np.shares_memory(tensors["base"].read(), tensors["tied"].read())


@pytest.mark.parity
def test_reads_modules_of_torch(opened):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    module.register_parameter("A_log", torch.nn.Parameter(torch.randn(2)))
    module.A_log._no_weight_decay = True
    state = module.state_dict()
    assert state._metadata
    for value in (state, dict(module.named_parameters())):
        tensors = opened(saved(torch, value))
        assert list(tensors) == list(value)
        for name, stored in tensors.items():
            expected = value[name].detach().numpy()
            np.testing.assert_array_equal(stored.read(), expected, strict=True)


@pytest.mark.parity
def test_torch_reads_the_files_of_these_tests(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "small.bin").write_bytes(small())
    state = torch.load(tmp_path / "small.bin")
    assert state["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert list(state) == list(ITEMS)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_refuses_other_files_of_torch(opened):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 2)
    state = module.state_dict()
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(module), script)
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimiser.step()
    trainer = {"epoch": 3, "optimizer": optimiser.state_dict(), "model": state, "lr": 1e-3}
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    for data, word in [
        (saved(torch, state, _use_new_zipfile_serialization=False), "legacy"),
        (saved(torch, module), "whole object, made by `torch.nn.modules.linear.Linear`"),
        (script.getvalue(), "TorchScript"),
        (saved(torch, trainer), "under 'model'"),
        (saved(torch, {**trainer, "path": io.BytesIO}), "under 'model'"),
        (saved(torch, optimiser.state_dict()), "under 'state'"),
        (saved(torch, state, pickle_protocol=4), "protocol 2"),
        (saved(torch, {"x": torch.ones(2).to(torch.float8_e4m3fn)}), "float8"),
        (saved(torch, {"x": torch.ones(2, dtype=torch.complex64)}), "ComplexFloatStorage"),
        (saved(torch, {"x": negated}), "resolve_neg"),
        (saved(torch, {"x": torch.ones(2).to_sparse()}), "sparse_tensor` for 'x'"),
        (saved(torch, {"x": torch.ones(1).expand(9)}), "contiguous"),
        (saved(torch, [torch.ones(2)]), "list"),
        (saved(torch, torch.ones(2)), "a tensor, not a state dict"),
    ]:
        with pytest.raises(CheckpointError, match=word):
            opened(data)
