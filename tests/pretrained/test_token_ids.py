"""The ids that a checkpoint declares are read, kept and written back, as is its tokenizer."""

import json
import os

import pytest

import mamba_eqx as mbx
from mamba_eqx import _atomic, _cli
from mamba_eqx.text import SpecialIds
from tests.support.checkpoints import BOTH, FAMILIES, assert_same, edit_config, make


pytestmark = pytest.mark.usefixtures("compile_fast")


MODEL, OTHER = make(BOTH["tied"]), make(BOTH["untied"])  # Of 16 and 13 rows.
BYTES = {"tokenizer_class": "ByteTokenizer"}
LAST = SpecialIds(eos=(15,))  # The last id of the vocabulary.
NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def ids_of(folder):
    return mbx.load_tokenizer(folder).ids


def fields(values):
    return {key: value for key, value in values.items() if key in NONE}


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        (None, {}, SpecialIds()),
        (None, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, SpecialIds(1, (2,), 0)),
        (None, {"eos_token_id": [2, 0, 2]}, SpecialIds(eos=(2, 0))),
        (None, {"bos_token_id": -1, "eos_token_id": -1, "pad_token_id": -1}, SpecialIds()),
        (None, NONE, SpecialIds()),
        (None, {"eos_token_id": []}, SpecialIds()),
        # Only the first file counts, as in transformers.
        ({"eos_token_id": [0, 2]}, {"eos_token_id": 5, "pad_token_id": 5}, SpecialIds(eos=(0, 2))),
        ({"eos_token_id": None, "temperature": 0.7}, {"eos_token_id": 5}, SpecialIds()),
        ({"temperature": 0.7}, {"eos_token_id": 5}, SpecialIds()),
        # Small copies of large models keep ids that their vocabulary has not.
        (None, {"bos_token_id": 16, "eos_token_id": [99, 15], "pad_token_id": 99}, LAST),
    ],
)  # fmt: skip
def test_ids_are_read(generation, config, want, tmp_path):
    config = {"model_type": "mamba", "hidden_size": 8, "vocab_size": 16} | config
    write(tmp_path, tokenizer_config=BYTES, config=config)
    if generation is not None:
        write(tmp_path, generation_config=generation)
    tokenizer = mbx.load_tokenizer(tmp_path)
    assert tokenizer.ids == want
    assert tokenizer.stop_tokens == want.eos


def test_rows_that_pad_an_official_vocabulary_are_tokens(tmp_path):
    config = {"d_model": 8, "vocab_size": 13, "pad_vocab_size_multiple": 4}
    generation = {"eos_token_id": [15, 16]}
    write(tmp_path, tokenizer_config=BYTES, config=config, generation_config=generation)
    assert ids_of(tmp_path).eos == (15,)


@pytest.mark.parametrize("file", ["generation_config", "config"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "</s>"),
        ("eos_token_id", True),
        ("eos_token_id", 2.0),
        ("eos_token_id", [0, None]),
        ("eos_token_id", [[0]]),
        ("eos_token_id", {"id": 0}),
        ("bos_token_id", [1]),
        ("pad_token_id", "<pad>"),
    ],
)
def test_values_that_are_no_ids_raise(file, key, value, tmp_path):
    files = {"tokenizer_config": BYTES, "config": {"vocab_size": 16}}
    files[file] = {**files.get(file, {}), key: value}
    with pytest.raises(mbx.CheckpointError, match=rf"{file}\.json: `{key}` must be a token id.*"):
        mbx.load_tokenizer(write(tmp_path, **files))


@pytest.mark.parametrize(
    "content", ["[]", "{", "", "null", '{"eos_token_id": 1, "eos_token_id": 2}']
)
def test_damaged_generation_config_raises(content, tmp_path):
    write(tmp_path, tokenizer_config=BYTES, config={"vocab_size": 16})
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(mbx.CheckpointError, match=r"generation_config\.json: "):
        mbx.load_tokenizer(tmp_path)


# Saving.


IDS = [SpecialIds(), SpecialIds(1, (2,), 0), SpecialIds(None, (0, 2)), SpecialIds(pad=3)]


@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.parametrize("layout", ["transformers", "state-spaces", "mistral"])
def test_saved_with_the_model(layout, ids, tmp_path):
    model = make(FAMILIES["mistral"]["mistral"]["tied"]) if layout == "mistral" else MODEL
    mbx.save_pretrained(model, tmp_path, layout=layout, tokenizer=mbx.ByteTokenizer(ids=ids))
    assert ids_of(tmp_path) == ids
    assert_same(mbx.from_pretrained(tmp_path), model)
    eos = {0: None, 1: 2, 2: [0, 2]}[len(ids.eos)]
    want = {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
    assert read(tmp_path, "generation_config.json") == want
    if layout == "transformers":
        assert fields(read(tmp_path, "config.json")) == want
    elif layout == "state-spaces":  # The official loader refuses unknown fields.
        assert fields(read(tmp_path, "config.json")) == {}


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_saved_alone(ids, tmp_path):
    """Whatever the config declares, the ids are those of the saved tokenizer."""
    mbx.save_pretrained(MODEL, tmp_path)
    edit_config(tmp_path, {"bos_token_id": 4, "eos_token_id": [4, 5], "pad_token_id": 6})
    write(tmp_path, generation_config={"temperature": 0.7, "eos_token_id": 9})
    mbx.save_tokenizer(mbx.ByteTokenizer(ids=ids), tmp_path)
    assert ids_of(tmp_path) == ids
    assert read(tmp_path, "generation_config.json")["temperature"] == 0.7
    (tmp_path / "generation_config.json").write_text("damaged")
    mbx.save_tokenizer(mbx.ByteTokenizer(ids=ids), tmp_path)
    assert ids_of(tmp_path) == ids


OLD = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
       "tokenizer.model", "vocab.json", "merges.txt")  # fmt: skip


def old_checkpoint(folder, outside):
    """Writes a checkpoint with every file of a tokenizer, one of which is a link."""
    mbx.save_pretrained(OTHER, folder)
    for name in OLD:
        (folder / name).write_text("old")
    (folder / "notes.txt").write_text("mine")
    outside.write_text("outside")
    (folder / "tokenizer_config.json").symlink_to(outside)
    return folder


@pytest.mark.parametrize("how", ["save_tokenizer", "save_pretrained", "convert"])
def test_another_tokenizer_is_replaced_as_a_whole(how, tmp_path):
    folder = old_checkpoint(tmp_path / "there", tmp_path / "outside")
    tokenizer = mbx.ByteTokenizer(ids=SpecialIds(eos=(3,)))
    if how == "save_tokenizer":
        mbx.save_tokenizer(tokenizer, folder)
    elif how == "save_pretrained":
        mbx.save_pretrained(MODEL, folder, tokenizer=tokenizer)
    else:
        mbx.save_pretrained(MODEL, tmp_path / "new", tokenizer=tokenizer)
        assert _cli.main(["convert", str(tmp_path / "new"), str(folder), "--overwrite"]) == 0
    assert ids_of(folder).eos == (3,)
    assert_same(mbx.from_pretrained(folder), OTHER if how == "save_tokenizer" else MODEL)
    ours = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(folder)) == [*ours, "notes.txt", "tokenizer_config.json"]
    # The link is replaced, and not written through.
    assert (tmp_path / "outside").read_text() == "outside"


def test_without_a_tokenizer_the_old_one_stays(tmp_path):
    folder = old_checkpoint(tmp_path / "there", tmp_path / "outside")
    write(folder, generation_config={"eos_token_id": 1})
    before = {name: (folder / name).read_text() for name in (*OLD, "generation_config.json")}
    mbx.save_pretrained(MODEL, folder)
    assert {name: (folder / name).read_text() for name in before} == before
    assert fields(read(folder, "config.json")) == NONE


@pytest.mark.parametrize(
    "at", [1, 2, 14, *(pytest.param(at, marks=pytest.mark.slow) for at in range(3, 14))]
)
@pytest.mark.parametrize("how", ["save_tokenizer", "save_pretrained"])
def test_failed_save_keeps_everything(how, at, tmp_path, monkeypatch):
    """Whichever move fails, all files are as before."""
    folder = old_checkpoint(tmp_path / "there", tmp_path / "outside")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls, replace = 0, os.replace

    def failing(*paths):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError("the disk is full")
        replace(*paths)

    monkeypatch.setattr(_atomic.os, "replace", failing)
    monkeypatch.setattr("mamba_eqx.pretrained._save._write_tensors", lambda folder, *_: None)
    save = {
        "save_tokenizer": lambda: mbx.save_tokenizer(mbx.ByteTokenizer(), folder),
        "save_pretrained": lambda: mbx.save_pretrained(
            MODEL, folder, tokenizer=mbx.ByteTokenizer()
        ),
    }[how]
    moves = {"save_tokenizer": 10, "save_pretrained": 13}[how]
    if at > moves:
        save()
        assert calls == moves
        return
    with pytest.raises(OSError, match="disk is full"):
        save()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder / "tokenizer_config.json").is_symlink()


def test_other_tokenizers_are_refused(tmp_path, as_users_run):
    for save in (
        lambda: mbx.save_tokenizer(17, tmp_path / "new"),  # pyright: ignore[reportArgumentType]
        lambda: mbx.save_pretrained(MODEL, tmp_path / "new", tokenizer="bytes"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError, match="`tokenizer` must be a `TextTokenizer`"):
            save()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        mbx.save_tokenizer(mbx.ByteTokenizer(), tmp_path / "file")


# Converting.


def convert(source, dest, *options):
    assert _cli.main(["convert", str(source), str(dest), *options]) == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_convert_keeps_ids_and_files(in_place, tmp_path, capsys):
    source = tmp_path / "source"
    mbx.save_pretrained(MODEL, source)
    declared = {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": None}
    edit_config(source, declared | {"eos_token_id": 7, "pad_token_id": 5})
    for name in OLD:  # The content is copied without a look at it.
        (source / name).write_text(f"of {name}")
    write(source, generation_config={"eos_token_id": [0, 2], "temperature": 0.7, "do_sample": True})
    names = [*OLD, "generation_config.json"]
    before = {name: (source / name).read_bytes() for name in names}
    dest = source if in_place else tmp_path / "dest"
    convert(source, dest, "--dtype", "bfloat16", "--overwrite")
    assert {name: (dest / name).read_bytes() for name in names} == before
    # transformers does not read these, but they are kept as they are.
    kept = declared | {"eos_token_id": 7, "pad_token_id": 5}
    assert fields(read(dest, "config.json")) == kept


def test_convert_keeps_ids_through_every_layout(tmp_path, capsys):
    mbx.save_pretrained(MODEL, tmp_path / "0")
    want = {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 3}
    edit_config(tmp_path / "0", want)
    convert(tmp_path / "0", tmp_path / "1")
    # transformers reads the config if there is no other file.
    assert not (tmp_path / "1" / "generation_config.json").exists()
    convert(tmp_path / "1", tmp_path / "2", "--layout", "state-spaces")
    assert fields(read(tmp_path / "2", "config.json")) == {}
    convert(tmp_path / "2", tmp_path / "3")
    assert fields(read(tmp_path / "3", "config.json")) == want
    assert read(tmp_path / "3", "generation_config.json") == want


def test_files_that_are_not_regular_are_refused(tmp_path, capsys):
    mbx.save_pretrained(MODEL, tmp_path / "source")
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json"):
        os.mkfifo(tmp_path / "source" / name)
        assert _cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "dest")]) == 2
        assert f"{name}: it is not a regular file" in capsys.readouterr().err
        assert not (tmp_path / "dest").exists()
        (tmp_path / "source" / name).unlink()
