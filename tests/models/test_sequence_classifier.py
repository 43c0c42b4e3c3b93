"""`SequenceClassifier`: its logits are those of the last real token, however the text arrives."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.testing import _laws as laws
from tests.support.cases import fold, scan


pytestmark = pytest.mark.usefixtures("compile_fast")

BACKBONE = mbx.LanguageModelConfig(11, (mbx.BlockConfig(mbx.Mamba1Config(4, d_state=2)),))
CONFIG = mbx.SequenceClassifierConfig(BACKBONE, n_classes=3)
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2])


@functools.cache
def classifier() -> mbx.SequenceClassifier:
    return CONFIG.build(key=jr.key(0))


@eqx.filter_jit
def classify(model, tokens, lengths):
    return jax.vmap(model)(tokens, length=lengths)


@pytest.mark.parametrize(
    "law",
    [
        laws.recurrence,
        *(
            pytest.param(law, marks=pytest.mark.slow)
            for law in (laws.splitting, laws.reset, laws.length)
        ),
    ],
)
def test_scan_and_step_obey_the_laws(law):
    model = classifier()
    state = fold(model, TOKENS[:2], model.init_state())[1]
    law(laws.Case(model, TOKENS, state, np.arange(7) == 4, 3), "float32")


def test_a_call_returns_the_logits_of_the_last_real_token():
    """Whatever the padding holds, and for every length in one compiled batch."""
    model = classifier()
    every = np.asarray(scan(model, TOKENS, model.init_state())[0])
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), every[-1], rtol=1e-5)
    lengths = np.arange(8)
    padded = np.where(np.arange(7) < lengths[:, None], TOKENS, 10)
    got = classify(model, padded, lengths)
    np.testing.assert_allclose(got[1:], every, rtol=1e-5)
    assert np.all(np.isnan(got[0]))  # No token, no logits.
    np.testing.assert_allclose(model(jnp.asarray(padded[3]), length=3), every[2], rtol=1e-5)
    assert every.shape == (7, 3)


def test_gradients_do_not_reach_padding_or_other_heads():
    def loss(model, tokens):
        return jnp.sum(model(tokens, length=jnp.array(4)) ** 2)

    grads = eqx.filter_grad(loss)(classifier(), jnp.asarray([3, 1, 4, 1, 8, 8, 8]))
    used = np.any(np.asarray(grads.backbone.embedding.weight) != 0, axis=1)
    assert set(np.flatnonzero(used)) == {1, 3, 4}
    assert np.all(np.asarray(grads.score.weight) != 0)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_keeps_the_language_model_without_its_head(tie):
    config = mbx.LanguageModelConfig(11, BACKBONE.layers, tie_embeddings=tie)
    model = config.build(key=jr.key(1), dtype=jnp.bfloat16)
    made = mbx.SequenceClassifier(model, n_classes=1, key=jr.key(2))
    assert made.backbone.lm_head is None
    assert eqx.tree_equal(made.backbone.layers, model.layers)
    assert made.score.dtype == jnp.bfloat16
    logits = jax.eval_shape(made, jnp.asarray(TOKENS))
    assert (logits.shape, logits.dtype) == ((1,), jnp.float32)


def test_config_is_read_from_the_model_and_from_json():
    shapes = eqx.filter_eval_shape(lambda: CONFIG.build(stacked=True, key=jr.key(0)))
    assert mbx.SequenceClassifierConfig.of(shapes) == CONFIG
    assert mbx.SequenceClassifierConfig.from_json(CONFIG.to_json()) == CONFIG
    untied = mbx.LanguageModelConfig(11, BACKBONE.layers, tie_embeddings=False)
    assert mbx.SequenceClassifierConfig(untied, 3) == CONFIG


def test_summary_has_the_state():
    assert (
        mbx.summary(classifier()).parts[0].state_bytes
        == mbx.summary(classifier().backbone).parts[0].state_bytes
    )


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier()(jnp.asarray(TOKENS), length=0), "at least one real token, but got 7"),
        (lambda: classifier()(jnp.zeros(0, int)), "at least one real token, but got 0 tokens"),
        (
            lambda: classifier()(jnp.zeros((2, 3), int)),
            "takes one sequence of tokens",
        ),
        (
            lambda: mbx.SequenceClassifier(classifier(), n_classes=2, key=jr.key(0)),  # pyright: ignore
            "`model` must be a `LanguageModel`, but got SequenceClassifier",
        ),
        (lambda: mbx.SequenceClassifierConfig(BACKBONE, 0), "`n_classes` must be"),
        (
            lambda: mbx.SequenceClassifierConfig(CONFIG, 2),  # pyright: ignore
            "`backbone` must be a `LanguageModelConfig`, but got SequenceClassifierConfig",
        ),
        (lambda: mbx.SequenceClassifierConfig.from_json('{"n_classes": 2}'), "missing .'backbone'"),
        (
            lambda: mbx.SequenceClassifierConfig.from_json('{"n_classes": 2, "backbone": []}'),
            "Expected a JSON object for `backbone`",
        ),
        (lambda: mbx.SequenceClassifierConfig.from_json("[" * 100_000), "nested too deeply"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
