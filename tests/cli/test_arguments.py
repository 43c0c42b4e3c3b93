"""Any arguments are carried out, or refused with one line."""

import contextlib
import io
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st

import mamba_eqx as mbx
from mamba_eqx.training import LoRA, save_lora
from tests.support.commands import byte_model, call


OPTIONS = """
    --model --adapter --tokenizer --dtype --revision --cache-dir --local-files-only --token-file
    --force-download --endpoint --max-new-tokens --temperature --top-k --top-p --min-p --typical-p
    --repetition-penalty --presence-penalty --frequency-penalty --penalty-window --seed --stop
    --json --file --system --plain --layout --max-shard-size --help --version --tpo-k -x --
"""
VALUES = """
    model empty file noise missing bytes float32 stored 0 1 2 -1 0.5 1e-38 1e-46 1e39 nan inf -inf x
    9999999999 1e400 a/b a/b/c .. 5GB 0B transformers state-spaces - # ' \\ \x00 \x1b[2J é 漢
"""
_VALUE = st.sampled_from(VALUES.split()) | st.text(max_size=8)
_COMMAND = st.sampled_from(["generate", "chat", "score", "inspect"])
_OPTION = st.sampled_from(OPTIONS.split())
_ARGUMENTS = st.lists(
    st.tuples(_OPTION, _VALUE) | st.tuples(_OPTION) | st.tuples(_VALUE), max_size=3
).map(lambda parts: [argument for part in parts for argument in part])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and other files, in which the commands run without a network."""
    path = tmp_path_factory.mktemp("here")
    mbx.save_pretrained(byte_model(), path / "model")
    mbx.save_tokenizer(mbx.ByteTokenizer(), path / "model")
    (path / "empty").mkdir()
    (path / "file").write_text("To be")
    (path / "noise").write_bytes(b"\xff\x00")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield path


def check(args):
    stdin = io.TextIOWrapper(io.BytesIO(b"To be\n"))
    with (
        mock.patch("sys.stdin", stdin),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        code = call(*args)
    assert code in (0, 2)
    lines = errors.getvalue().splitlines()
    assert "Traceback" not in errors.getvalue()
    if code == 2:
        assert len(lines) >= 1
        *reported, last = lines
        # A chat goes on after a mistake, and so does `score` after a text.
        assert all(re.match("(mamba-eqx: )?error: ", line) for line in reported)
        assert re.match("mamba-eqx[a-z ]*: error: ", last)
        assert all(line.isprintable() and len(line) < 1100 for line in lines)


@pytest.mark.usefixtures("folder", "as_users_run")
@given(command=_COMMAND, args=_ARGUMENTS)
@settings(max_examples=20)
def test_any_arguments(command, args):
    """Without a model, most fail before anything is loaded."""
    check([command, *args, "--model", "empty"])


@pytest.mark.slow
@pytest.mark.usefixtures("folder", "as_users_run")
@given(command=_COMMAND, args=_ARGUMENTS)
@settings(max_examples=200)
def test_any_arguments_with_a_model(command, args):
    few = [] if command in ("inspect", "score") else ["--max-new-tokens", "2"]
    model = ["model"] if command == "inspect" else ["--model", "model"]
    text = ["x"] if command in ("generate", "score") else []
    check([command, *text, *few, *model, *args])


def test_tokens_are_read_from_a_file_and_never_shown(folder, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mamba_eqx._cli._inspect.open_checkpoint",
        lambda source, hub, **_: seen.append(hub) or pytest.fail("the model was opened"),
    )
    for data in (b"hf_secret\n", b"  hf_secret  "):
        (tmp_path / "token").write_bytes(data)
        with pytest.raises(pytest.fail.Exception):
            call("inspect", "a/b", "--token-file", tmp_path / "token")
    assert [hub.token for hub in seen] == ["hf_secret"] * 2
    for data in (b"", b"hf_secret hf_other", "hf_sécret".encode()):
        (tmp_path / "token").write_bytes(data)
        assert call("inspect", "a/b", "--token-file", tmp_path / "token") == 2
        out, err = capsys.readouterr()
        assert "--token-file must name a file with one token" in err
        assert "hf_" not in out + err


@pytest.mark.slow
def test_adapters_change_the_model(folder, tmp_path, capsys):
    model = mbx.from_pretrained(folder / "model", dtype=jnp.float32)
    lora = LoRA.init(model, rank=2, key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.5, lora)
    save_lora(lora, model, tmp_path)
    ids = list(b"To be, or not to be")
    for options, want in (((), model), (("--adapter", tmp_path), lora.merge(model))):
        assert (
            call("score", bytes(ids).decode(), "--json", "--model", folder / "model", *options) == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert found["log_prob"] == pytest.approx(float(mbx.score(want, ids).log_probs.sum()), 1e-5)


@pytest.mark.slow
def test_tokens_may_be_added_in_the_padding_of_the_embedding(tmp_path, capsys):
    """The largest id counts, and the rows of the embedding, not the numbers of tokens."""
    pytest.importorskip("tokenizers")
    import tokenizers

    from tests.support.tokenizers import CONFIG, FILES

    fast = tokenizers.Tokenizer.from_str(FILES["byte_level"])
    count = fast.get_vocab_size()
    fast.add_tokens(["qqq"])
    block = mbx.BlockConfig(mbx.Mamba1Config(8, d_state=4))
    for rows, code in ((count + 3, 0), (count, 2)):
        config = mbx.LanguageModelConfig(count, (block,), padded_vocab_size=rows)
        path = tmp_path / str(rows)
        model = config.build(key=jax.random.key(0))
        mbx.save_pretrained(model, path, layout="state-spaces")
        mbx.save_tokenizer(mbx.TextTokenizer(fast.to_str(), CONFIG), path)
        assert call("generate", "To qqq", "--max-new-tokens", 2, "--model", path) == code
    assert f"token ids up to {count}, but the model at" in capsys.readouterr().err
