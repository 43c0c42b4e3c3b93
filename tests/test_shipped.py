"""The bundled model: its files, its score, and its outputs in transformers."""

import json
import lzma
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mamba_eqx as mbx


FOLDER = mbx.SHIPPED
CORPUS = Path(__file__).parents[1] / "examples" / "data" / "shakespeare.txt.xz"


@pytest.fixture(scope="module")
def model() -> mbx.LanguageModel:
    return mbx.from_pretrained(FOLDER, dtype=jnp.float32)


def test_dtypes_and_size_of_the_files():
    model = mbx.from_pretrained(FOLDER)
    mask = mbx.recurrence_mask(model)
    for leaf, recurrence in zip(jax.tree.leaves(model), jax.tree.leaves(mask), strict=True):
        assert leaf.dtype == (jnp.float32 if recurrence else jnp.bfloat16)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert parameters == json.loads((FOLDER / "training.json").read_text())["parameters"]
    assert f"{parameters:,}" in (FOLDER / "README.md").read_text()
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6e6


def test_score_on_the_held_out_play(model: mbx.LanguageModel):
    """Scores the beginning of *Twelfth Night*, after its list of characters."""
    works = lzma.decompress(CORPUS.read_bytes()).split(b"\0")
    play = next(work for work in works if work.startswith(b"TWELFTH NIGHT"))
    tokens = np.frombuffer(play[2000:10001], np.uint8).astype(np.int32)
    logits = eqx.filter_jit(model)(jnp.asarray(tokens[:-1]))
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    # The model card reports 1.940 for the whole play.
    assert float(jnp.mean(nats)) / np.log(2) < 2.07


def test_generates_words(model: mbx.LanguageModel):
    tokenizer = mbx.ByteTokenizer()
    out = mbx.generate(model, tokenizer.encode("ROMEO:"), 60)
    text = tokenizer.decode(np.asarray(out.tokens).tolist())
    assert text.startswith("\n")
    assert text.isascii()
    assert len(text.split()) > 8


@pytest.mark.slow
@pytest.mark.parity
def test_logits_match_transformers(model: mbx.LanguageModel):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MambaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = np.frombuffer(b"ROMEO:\nBut soft, what light", np.uint8).astype(np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(
        eqx.filter_jit(model)(jnp.asarray(tokens)), want, rtol=0, atol=1e-5 * np.abs(want).max()
    )
