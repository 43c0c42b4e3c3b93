"""`load_tokenizer` and `save_tokenizer`: the files of a checkpoint determine its tokenizer."""

import json
import os

import jax.random as jr
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained._tokenizer import _NEOX
from tests.support.checkpoints import BOTH, make


tokenizers = pytest.importorskip("tokenizers")

from tests.support.tokenizers import CHAT, CONFIG, FILES, TEMPLATE  # noqa: E402


BYTES = '{"tokenizer_class": "ByteTokenizer"}'


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{ending}").write_text(text, "utf-8")
    return folder


def test_loads_and_saves_in_a_folder(tmp_path):
    want = mbx.TextTokenizer(FILES["byte_level"], CONFIG)
    ids = want.encode_chat(CHAT)
    folder = write(tmp_path / "a", tokenizer_json=FILES["byte_level"], tokenizer_config_json=CONFIG)
    got = mbx.load_tokenizer(folder)
    assert isinstance(got, mbx.TextTokenizer)
    assert (got.encode_chat(CHAT), got.eos_token_id, got.vocab_size) == (
        ids,
        want.eos_token_id,
        want.vocab_size,
    )
    # A template in `chat_template.jinja` takes precedence over one in the config.
    old = CONFIG | {"chat_template": "{{ 'old' }}"}
    write(folder, tokenizer_config_json=old, chat_template_jinja=TEMPLATE)
    newer = mbx.load_tokenizer(str(folder))
    assert isinstance(newer, mbx.TextTokenizer)
    assert newer.encode_chat(CHAT) == ids
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    plain = mbx.load_tokenizer(folder)
    assert isinstance(plain, mbx.TextTokenizer)
    assert plain.eos_token_id is None
    assert not plain.has_template
    # A saved tokenizer replaces another one and loads unchanged.
    mbx.save_tokenizer(mbx.ByteTokenizer(), tmp_path / "b")
    assert isinstance(mbx.load_tokenizer(tmp_path / "b"), mbx.ByteTokenizer)
    mbx.save_tokenizer(newer, tmp_path / "b")
    again = mbx.load_tokenizer(tmp_path / "b")
    assert isinstance(again, mbx.TextTokenizer)
    assert again.encode_chat(CHAT) == ids


MAP = {
    "bos_token": "<|user|>",
    "eos_token": {"content": "<|assistant|>", "lstrip": False},
    "extra_special_tokens": ["<|endoftext|>", "<|user|>"],
}


# The older file counts only if the config does not list the added tokens.
MERGED = pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, "<|assistant|>"),
        ({"eos_token": "<|user|>"}, "<|assistant|>"),
        ({"eos_token": "<|user|>", "added_tokens_decoder": {}}, "<|user|>"),
    ],
)


def with_map(folder, config):
    files = {"tokenizer_json": FILES["byte_level"], "special_tokens_map_json": MAP}
    return write(folder, tokenizer_config_json=config, **files)


@MERGED
def test_special_tokens_map_is_read(config, want, tmp_path):
    got = mbx.load_tokenizer(with_map(tmp_path / "a", config))
    assert isinstance(got, mbx.TextTokenizer)
    assert got.eos_token_id == got.special_tokens[want]
    # The saved files declare the same without the older one.
    mbx.save_tokenizer(got, tmp_path / "b")
    assert mbx.load_tokenizer(tmp_path / "b").ids == got.ids
    assert not (tmp_path / "b" / "special_tokens_map.json").exists()


@pytest.mark.slow
@pytest.mark.parity
@MERGED
def test_transformers_reads_special_tokens_map_alike(config, want, tmp_path):
    transformers = pytest.importorskip("transformers")
    with_map(tmp_path / "a", config)
    mbx.save_tokenizer(mbx.load_tokenizer(tmp_path / "a"), tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert theirs.eos_token == want


def test_extra_special_tokens_of_both_files_are_joined(tmp_path):
    files = {"tokenizer_json": FILES["byte_level"], "special_tokens_map_json": MAP}
    config = {"extra_special_tokens": ["<|user|>", "<|assistant|>"]}
    got = mbx.load_tokenizer(write(tmp_path, tokenizer_config_json=config, **files))
    assert isinstance(got, mbx.TextTokenizer)
    assert got.config["extra_special_tokens"] == ["<|user|>", "<|assistant|>", "<|endoftext|>"]


def test_config_is_saved_as_it_was_read(tmp_path):
    config = {"chat_template": "{{ 'é漢🙂' }}", "note": "\ud800", "more": [1.5, None, {"a": True}]}
    folder = write(tmp_path / "a", tokenizer_json=FILES["byte_level"], tokenizer_config_json=config)
    got = mbx.load_tokenizer(folder)
    mbx.save_tokenizer(got, tmp_path / "b")
    again = mbx.load_tokenizer(tmp_path / "b")
    assert isinstance(again, mbx.TextTokenizer)
    assert again.config == config
    assert "é漢🙂" in (tmp_path / "b" / "tokenizer_config.json").read_text("utf-8")


def test_added_tokens_that_the_tokenizer_lacks_are_listed(tmp_path):
    added = {"<|user|>": 1, "<tool>": 300, "<|end|>": 301}
    folder = write(
        tmp_path,
        tokenizer_json=FILES["byte_level"],
        added_tokens_json=added,
        special_tokens_map_json={"eos_token": "<|end|>"},
    )
    got = mbx.load_tokenizer(folder)
    assert isinstance(got, mbx.TextTokenizer)
    assert got.config["added_tokens_decoder"] == {
        "300": {"content": "<tool>", "special": False},
        "301": {"content": "<|end|>", "special": True},
    }


def _pipe(path):
    os.mkfifo(path)


def _device(path):
    path.symlink_to("/dev/zero")


def _folder(path):
    path.mkdir()


def _huge(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make_file", [_pipe, _device, _folder, _huge])
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
     "added_tokens.json", "generation_config.json"],
)  # fmt: skip
def test_what_is_not_a_file_is_refused(name, make_file, tmp_path):
    """A pipe would wait for a writer, and a device never ends."""
    write(tmp_path / "a", tokenizer_json=FILES["byte_level"])
    (tmp_path / "a" / name).unlink(missing_ok=True)
    make_file(tmp_path / "a" / name)
    with pytest.raises((mbx.CheckpointError, IsADirectoryError), match=name):
        mbx.load_tokenizer(tmp_path / "a")


def test_byte_tokenizer_is_never_guessed(tmp_path):
    block = mbx.BlockConfig(mbx.Mamba1Config(4))
    model = mbx.LanguageModelConfig(256, (block,)).build(key=jr.key(0))
    mbx.save_pretrained(model, tmp_path)
    with pytest.raises(mbx.CheckpointError, match=r"has no tokenizer\.json.*tokens are bytes"):
        mbx.load_tokenizer(tmp_path)
    write(tmp_path, tokenizer_config_json=BYTES)
    assert isinstance(mbx.load_tokenizer(tmp_path), mbx.ByteTokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_json": "{}"}, r"tokenizer\.json: This is not the content"),
        ({"tokenizer_config_json": "[]"}, r"tokenizer_config\.json: it must be a JSON object"),
        ({"tokenizer_config_json": "{"}, r"tokenizer_config\.json: it is not valid JSON"),
        ({"config_json": '{"vocab_size": 50277, "model_type": "mamba"}'}, r"no tokenizer\.json"),
        ({"config_json": '{"vocab_size": 50280}'}, r"no tokenizer\.json"),
    ],
    ids=str,
)
def test_damaged_or_missing_files_raise(tmp_path, files, message):
    with pytest.raises(mbx.CheckpointError, match=message):
        mbx.load_tokenizer(write(tmp_path, **files))


def test_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        mbx.load_tokenizer(tmp_path / "nowhere")


def test_link_out_of_the_folder_raises(tmp_path):
    write(tmp_path / "other", tokenizer_json=FILES["byte_level"])
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tokenizer.json").symlink_to(tmp_path / "other" / "tokenizer.json")
    with pytest.raises(mbx.CheckpointError, match="a link that leaves the folder"):
        mbx.load_tokenizer(tmp_path / "here")


def test_loads_from_the_hub(hub, tmp_path):
    files = {"tokenizer.json": FILES["byte_level"].encode(), "config.json": b"{}"}
    repository = hub.add("me/mine", files)
    first = repository.refs["main"]
    repository.commit({"config.json": b"{}"})
    options = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    with pytest.raises(mbx.CheckpointError, match=r"'me/mine' \(commit .* has no tokenizer\.json"):
        mbx.load_tokenizer("me/mine", **options)
    got = mbx.load_tokenizer("me/mine", revision=first, **options)
    assert got.vocab_size == mbx.TextTokenizer(FILES["byte_level"]).vocab_size
    assert mbx.load_tokenizer("me/mine", revision=first, local_files_only=True, **options)
    with pytest.raises(mbx.CheckpointError, match="does not exist, or is private"):
        mbx.load_tokenizer("me/none", **options)


def test_original_repositories_use_the_neox_tokenizer(hub, tmp_path):
    """Only for their vocabulary size: other checkpoints may use the same layout."""
    options = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
    original = json.dumps({"d_model": 8, "n_layer": 2, "vocab_size": 50277}).encode()
    hub.add("state-spaces/mamba-tiny", {"config.json": original})
    message = r"^The repository 'state-spaces/mamba-tiny'.* the tokenizer of EleutherAI/gpt-neox"
    with pytest.raises(mbx.CheckpointError, match=message):
        mbx.load_tokenizer("state-spaces/mamba-tiny", **options)
    hub.add(_NEOX, {"config.json": b"{}", "tokenizer.json": FILES["byte_level"].encode()})
    got = mbx.load_tokenizer("state-spaces/mamba-tiny", **options)
    assert isinstance(got, mbx.TextTokenizer)
    folder = tmp_path / "converted"
    mbx.save_pretrained(make(BOTH["tied"]), folder, layout="state-spaces")
    with pytest.raises(mbx.CheckpointError, match=r"has no tokenizer\.json"):
        mbx.load_tokenizer(folder, **options)
