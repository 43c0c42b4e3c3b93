"""Batches are a function of the step; token files are mapped and written atomically."""

import lzma

import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import training


# Each token is its own position, so a batch shows which tokens it consists of.
PLACES = np.arange(1, 1001, dtype=np.uint16)


def batches(data, count):
    return [data[step] for step in range(count)]


def assert_targets_follow(batch, tokens):
    """Asserts that each target that counts is the token that follows in the text."""
    after = dict(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    for token, target in zip(batch.tokens[batch.mask], batch.targets[batch.mask], strict=True):
        assert after[int(token)] == target


def test_each_epoch_reads_every_window_once_in_another_order():
    data = training.Streams(PLACES, batch=4, length=5, seed=3)
    assert data.steps_per_epoch == 50
    epochs = []
    for start in (0, 50):
        seen = [data[step] for step in range(start, start + 50)]
        read = np.concatenate([batch.tokens for batch in seen])
        assert sorted(read.ravel().tolist()) == PLACES.tolist()
        for batch in seen:
            assert_targets_follow(batch, PLACES)
            # Windows are independent, and the first token does not follow the last one.
            begins = batch.tokens == 1
            begins[:, 0] = True
            np.testing.assert_array_equal(batch.reset, begins)
            np.testing.assert_array_equal(batch.mask, batch.targets != 1)
        epochs.append(read[:, 0])
    # The second epoch cuts the text at another offset and shuffles it in another order.
    assert set(epochs[0]) != set(epochs[1])
    jumps = [np.diff(starts) % len(PLACES) for starts in epochs]
    assert not np.array_equal(*jumps)


def test_rows_continue_until_their_stretch_ends():
    batch, length, stretch = 4, 3, 6
    data = training.Streams(PLACES, batch=batch, length=length, stretch=stretch, seed=1)
    epoch = data.steps_per_epoch
    assert epoch == 1000 // (length * stretch) * stretch // batch + 1
    before = data[0]
    assert before.reset[:, 0].all()
    jumps, read = [], before.tokens.ravel().tolist()
    for step in range(1, epoch):
        now = data[step]
        follows = now.tokens[:, 0] == before.targets[:, -1]
        assert (follows == ~now.reset[:, 0] | (now.tokens[:, 0] == 1)).all()
        np.testing.assert_array_equal(now.reset[:, 1:], now.tokens[:, 1:] == 1)
        jumps.append(~follows)
        read += now.tokens.ravel().tolist()
        before = now
    # Every row jumps every sixth step, but not all rows in the same step.
    for row in np.array(jumps).T:
        assert set(np.diff(np.flatnonzero(row))) == {stretch}
    assert np.array(jumps).sum(axis=1).max() < batch
    # Only at the end of an epoch do some rows read tokens of the next one.
    assert len(read) - len(set(read)) <= batch * stretch * length


def test_batch_depends_on_step_and_seed_only():
    tokens = np.random.default_rng(0).integers(0, 9, 700).astype(np.uint8)
    makers = [
        lambda seed: training.Streams(tokens, batch=3, length=4, stretch=3, separator=0, seed=seed),
        lambda seed: training.Packed(tokens, batch=3, length=20, separator=0, seed=seed),
    ]
    for make in makers:
        forwards = batches(make(5), 60)
        data = make(5)
        for step in reversed(range(60)):
            for got, want in zip(data[step], forwards[step], strict=True):
                np.testing.assert_array_equal(got, want)
        assert not np.array_equal(make(6)[0].tokens, forwards[0].tokens)
        first = forwards[0]
        assert first.tokens.dtype == first.targets.dtype == np.int32
        with pytest.raises(IndexError, match="step -1"):
            data[-1]


@pytest.mark.parametrize("stretch", [1, 4])
def test_documents_start_with_reset_and_loss_excludes_end_of_text(stretch):
    tokens = np.random.default_rng(1).integers(0, 6, 400)
    tokens[0] = 3
    data = training.Streams(tokens, batch=5, length=10, stretch=stretch, separator=0)
    ends = 0
    for batch in batches(data, 40):
        np.testing.assert_array_equal(
            batch.reset[:, 1:] | (batch.tokens[:, 1:] == 3),
            (batch.tokens[:, 1:] == 0) | (batch.tokens[:, 1:] == 3),
        )
        assert batch.reset[batch.tokens == 0].all()
        assert (batch.targets[~batch.mask] == 3).all()
        ends += int((~batch.mask).sum())
    # Each epoch crosses the end once, unless the end is in the part that it does not read.
    assert 3 <= ends <= 6
    # If the text starts with a separator, its end is the end of an ordinary document.
    tokens[0] = 0
    data = training.Streams(tokens, batch=5, length=10, stretch=stretch, separator=0)
    assert all(batch.mask.all() for batch in batches(data, 40))


def test_packed_rows_contain_whole_documents():
    rng = np.random.default_rng(2)
    lengths = [1, 2, 30, 7, 7, 6, 20, 21, 19, *rng.integers(1, 15, 60)]
    documents = []
    for length in lengths:
        first = 1 + sum(map(len, documents)) - len(documents)
        documents.append([0, *range(first, first + length - 1)])
    text = np.concatenate(documents)
    data = training.Packed(text, batch=3, length=20, separator=0)
    epoch = data.steps_per_epoch
    pieces, counted = [], 0
    rows = [row for batch in batches(data, 2 * epoch) for row in zip(*batch, strict=True)]
    number = len({tuple(tokens) for tokens, *_ in rows})
    for tokens, targets, reset, mask in rows[:number]:
        size = int(mask.sum()) + int(text[-1] in tokens)
        assert mask[: size - 1].all()
        assert not mask[size:].any()
        assert (tokens[size:] == 0).all()
        assert (targets[~mask] == 0).all()
        np.testing.assert_array_equal(reset[1:size], tokens[1:size] == 0)
        assert reset[0]
        assert not reset[size:].any()
        for piece in np.split(tokens[:size], np.flatnonzero(reset[:size])[1:]):
            pieces.append(piece.tolist())
        counted += int(mask.sum())
    # Every token but the last has a target, once per epoch.
    assert counted == len(text) - 1
    wanted = [d[i : i + 20] for d in documents for i in range(0, len(d), 20)]
    assert sorted(pieces) == sorted(wanted)
    # A row contains more than one document on average.
    assert len(text) / (20 * number) > 0.75


def test_packed_targets_are_next_tokens():
    """This includes the cut of a document that is longer than a row."""
    text = np.array([0, *range(1, 50), 0, *range(50, 55)])
    (batch,) = batches(training.Packed(text, batch=3, length=20, separator=0), 1)
    rows = sorted(zip(*(x.tolist() for x in batch), strict=True))
    assert [row[0][:2] for row in rows] == [[0, 1], [20, 21], [40, 41]]
    assert rows[0][1] == list(range(1, 21))
    assert rows[2][0] == [*range(40, 50), 0, *range(50, 55), 0, 0, 0, 0]
    assert rows[2][1] == [*range(41, 50), 0, *range(50, 55), 0, 0, 0, 0, 0]
    assert rows[2][2] == [i in (0, 10) for i in range(20)]
    assert rows[2][3] == [i < 15 for i in range(20)]


def test_token_files_are_memory_mapped(tmp_path):
    text = "Two,\0or three.\0"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    np.arange(300, dtype=">u2").tofile(tmp_path / "raw")
    mapped = training.read_tokens(tmp_path / "a.txt", vocab_size=256)
    assert isinstance(mapped.base, np.memmap)
    assert bytes(mapped) == text.encode()
    assert bytes(training.read_tokens(tmp_path / "a.txt.xz")) == text.encode()
    raw = training.read_tokens(tmp_path / "raw", dtype=">u2", vocab_size=300)
    assert raw.tolist() == list(range(300))
    with pytest.raises(ValueError, match="read-only"):
        raw[0] = 1


class Words:
    """A user-defined tokenizer."""

    vocab_size = 300

    def encode(self, text):
        return [len(word) + 200 for word in text.split()]

    def decode(self, ids):
        raise NotImplementedError

    def decoder(self):
        raise NotImplementedError

    def token_bytes(self, token):
        raise NotImplementedError


@pytest.mark.parametrize("tokenizer", [mbx.ByteTokenizer(), Words()], ids=["bytes", "words"])
def test_write_tokens_is_incremental_and_atomic(tmp_path, tokenizer):
    path = tmp_path / "books.npy"
    documents = ["to be", "", "or not to be"]
    wanted = [token for text in documents for token in (9, *tokenizer.encode(text))]
    count = training.write_tokens(path, iter(documents), tokenizer, separator=9)
    tokens = training.read_tokens(path, vocab_size=300)
    assert tokens.tolist() == wanted
    assert count == len(wanted)
    assert tokens.dtype == (np.uint8 if tokenizer.vocab_size == 256 else np.uint16)
    assert isinstance(tokens.base, np.memmap)
    assert training.document_starts(tokens, 9).tolist() == [
        i for i, token in enumerate(wanted) if token == 9
    ]

    def broken():
        yield "a"
        raise OSError("the disk of the texts")

    with pytest.raises(OSError, match="of the texts"):
        training.write_tokens(path, broken(), tokenizer, separator=9)
    assert training.read_tokens(path).tolist() == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["books.npy"]


def test_document_starts_does_not_depend_on_piece_size(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 4, 100).astype(np.uint8)
    tokens[0] = 1
    whole = training.document_starts(tokens, 0)
    assert whole.tolist() == [0, *np.flatnonzero(tokens == 0)]
    monkeypatch.setattr("mamba_eqx.training.data._documents._PIECE", 7)
    np.testing.assert_array_equal(training.document_starts(tokens, 0), whole)
    assert training.document_starts(tokens[1:], 9).tolist() == [0]


def test_hold_out_end_and_documents():
    train, held_out = training.hold_out_end(PLACES, 0.05)
    assert train.tolist() + held_out.tolist() == PLACES.tolist()
    assert len(held_out) == 50
    assert train.base is not None
    text = np.frombuffer(b"HAMLET who\0MACBETH is\0OTHELLO\0HAMLET again", np.uint8)
    names = [b"HAMLET", b"OTHELLO"]
    train, held_out = training.hold_out_documents(text, names, separator=0)
    assert bytes(train) == b"\0MACBETH is"
    assert bytes(held_out) == b"\0HAMLET who\0OTHELLO\0HAMLET again"


def test_invalid_arguments_raise(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "odd").write_bytes(b"abc")
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "negative.npy", np.array([1, -2]))
    np.save(tmp_path / "high.npy", np.array([1, 2, 70], np.uint16))

    def read(name, **options):
        return lambda: training.read_tokens(tmp_path / name, **options)

    streams = training.Streams
    for message, call in {
        r"empty is empty. Give a file": read("empty"),
        r"empty.npy is empty": read("empty.npy"),
        r"odd has 3 bytes, .* not a whole number of uint16": read("odd", dtype=np.uint16),
        r"must be an integer dtype, but got float32": read("odd", dtype=np.float32),
        r"floats.npy must .* contains float64 of shape \(3,\)": read("floats.npy"),
        r"negative.npy .* token 1 is -2": read("negative.npy"),
        r"high.npy .* 0..69, but token 2 is 70": read("high.npy", vocab_size=70),
        r"odd .* 0..49, but token 0 is 97": read("odd", vocab_size=50),
        r"1 windows of 1001 tokens, but has 1000 tokens": lambda: streams(
            PLACES, batch=1, length=1001
        ),
        r"11 windows of 100 tokens, but has 1000 tokens": lambda: streams(
            PLACES, batch=1, length=100, stretch=11
        ),
        r"`batch` must be an integer of at least 1": lambda: streams(PLACES, batch=0, length=5),
        r"`seed` must be at least 0, but got -1": lambda: streams(
            PLACES, batch=1, length=5, seed=-1
        ),
        r"`tokens` must have at least two tokens, but has 1": lambda: training.Packed(
            PLACES[:1], batch=1, length=5, separator=0
        ),
        r"`fraction` must be between 0 and 1, but got 1": lambda: training.hold_out_end(
            PLACES, 1.0
        ),
        r"but got fraction=0.0001 of 1000 tokens": lambda: training.hold_out_end(PLACES, 1e-4),
        r"none of 1 documents starts with b'X'": lambda: training.hold_out_documents(
            PLACES, [b"X"], separator=0
        ),
        r"none of 1 documents starts with b'Y'": lambda: training.hold_out_documents(
            np.zeros(0, np.uint8), [b"Y"], separator=0
        ),
        r"`separator` must .*, but got 300 and uint8": lambda: training.hold_out_documents(
            PLACES.astype(np.uint8), [b"X"], separator=300
        ),
        r"all 1 documents are held out": lambda: training.hold_out_documents(
            PLACES, [[1, 2]], separator=0
        ),
        r"`path` must end in .npy": lambda: training.write_tokens(
            tmp_path / "a.bin", [], mbx.ByteTokenizer(), separator=0
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training.read_tokens(tmp_path / "nowhere")
    # A text of exactly one window is long enough.
    assert training.Streams(PLACES[:5], batch=2, length=5)[7].tokens.shape == (2, 5)
