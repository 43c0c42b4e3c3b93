"""The loss of the next token, written out in other words."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import mamba_eqx as mbx
from mamba_eqx import training

from .cases import quick


pytestmark = pytest.mark.usefixtures("compile_fast")

VOCAB, ROWS, SEQ = 11, 3, 10


@functools.cache
def model(mixer=mbx.Mamba1Config(8, d_state=4), layers=1):  # noqa: B008
    config = mbx.LanguageModelConfig(
        VOCAB, (mbx.BlockConfig(mixer),) * layers, padded_vocab_size=VOCAB + 2
    )
    return config.build(key=jr.key(0), dtype=jnp.float32)


def batch_of(seed, rows=ROWS, seq=SEQ):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, seq + 1)).astype(np.int32)
    return training.Batch(
        jnp.asarray(tokens[:, :-1]),
        jnp.asarray(tokens[:, 1:]),
        jnp.asarray(rng.random((rows, seq)) < 0.2),
        jnp.asarray(rng.random((rows, seq)) < 0.7),
    )


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (np.abs(b).max() + 1e-8))


@given(
    st.integers(0, 99),
    st.sampled_from([7, 1024]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.1]),
)
def test_cross_entropy_is_its_equation(seed, chunk, smoothing, z_loss):
    batch = batch_of(seed)
    features = jr.normal(jr.key(seed), (ROWS, SEQ, 8))

    def ours(features, model):
        return training.cross_entropy(
            model,
            features,
            jnp.where(batch.mask, batch.targets, -7),  # what does not count may be no token
            jnp.asarray(batch.mask),
            label_smoothing=smoothing,
            z_loss=z_loss,
            chunk=chunk,
        )

    def theirs(features, model):
        logits = (features @ model.embedding.weight.T)[..., :VOCAB]
        wanted = optax.smooth_labels(jax.nn.one_hot(batch.targets, VOCAB), smoothing)
        loss = optax.softmax_cross_entropy(logits, wanted)
        loss += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(jnp.where(batch.mask, loss, 0.0)) / batch.mask.sum().astype(jnp.float32)

    for got, want in zip(
        quick(jax.value_and_grad(ours, (0, 1)))(features, model()),
        quick(jax.value_and_grad(theirs, (0, 1)))(features, model()),
        strict=True,
    ):
        close(got, want)


@pytest.mark.parity
def test_label_smoothing_is_that_of_torch():
    torch = pytest.importorskip("torch")
    features = jr.normal(jr.key(1), (SEQ, 8))
    targets = jr.randint(jr.key(2), (SEQ,), 0, VOCAB)
    logits = np.array(features @ model().embedding.weight[:VOCAB].T)  # a copy that torch may write
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.tensor(targets.tolist()), label_smoothing=0.2
    )
    mask = jnp.ones(SEQ, jnp.bool_)
    got = training.cross_entropy(model(), features, targets, mask, label_smoothing=0.2)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)


def test_no_array_of_all_logits_is_made():
    """Neither forward nor in reverse: looked for in everything that is computed."""
    rows, seq, chunk = 4, 32, 16
    batch = batch_of(0, rows, seq)
    loss = functools.partial(training.next_token_loss, batch=batch, chunk=chunk)
    program = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(model())

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                if VOCAB in variable.aval.shape or VOCAB + 2 in variable.aval.shape:
                    yield variable.aval.size
            for inner in jax.tree.leaves(list(equation.params.values())):
                if hasattr(inner, "eqns"):
                    yield from sizes(getattr(inner, "jaxpr", inner))

    found = list(sizes(program.jaxpr))
    assert max(found) == chunk * (VOCAB + 2)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_next_token_loss_is_a_mean_over_rows_run_apart(rows):
    batch = batch_of(3, rows)
    carry = training.empty_carry(model(), rows)
    loss, aux = quick(training.next_token_loss)(model(), batch, carry)
    total = 0.0
    for row in range(rows):
        logits, state = model().scan(batch.tokens[row], reset=batch.reset[row])
        log_probs = jax.nn.log_softmax(logits[:, :VOCAB])
        right = log_probs[jnp.arange(SEQ), batch.targets[row]]
        total -= float(jnp.sum(jnp.where(batch.mask[row], right, 0.0)))
        close(jax.tree.map(lambda leaf, row=row: leaf[row], aux.carry), state)
    assert int(aux.weight) == int(batch.mask.sum())
    np.testing.assert_allclose(float(loss) * int(aux.weight), total, rtol=1e-5)


def test_without_targets_that_count_the_loss_is_zero():
    batch = batch_of(0)._replace(mask=jnp.zeros((ROWS, SEQ), jnp.bool_))
    run = quick(jax.value_and_grad(training.next_token_loss, has_aux=True))
    (loss, _), grads = run(model(), batch)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "mixer",
    [mbx.Mamba1Config(8, d_state=4), mbx.AttentionConfig(8, nheads=2)],
    ids=["mamba1", "attention"],
)
def test_packed_documents_are_as_documents_apart(mixer):
    """Values and gradients."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, size).astype(np.int32) for size in (4, 2, 7)]
    tokens = np.concatenate([d[:-1] for d in documents])[None]
    targets = np.concatenate([d[1:] for d in documents])[None]
    reset = np.zeros(tokens.shape, np.bool_)
    reset[0, np.cumsum([0] + [len(d) - 1 for d in documents[:-1]])] = True
    packed = training.Batch(tokens, targets, reset, np.ones_like(reset))

    def apart(model):
        total = jnp.zeros(())
        for d in documents:
            log_probs = jax.nn.log_softmax(model(jnp.asarray(d[:-1]))[:, :VOCAB])
            total -= jnp.sum(log_probs[jnp.arange(len(d) - 1), jnp.asarray(d[1:])])
        return total / len(tokens[0])

    run = quick(jax.value_and_grad(training.next_token_loss, has_aux=True))
    (loss, _), grads = run(model(mixer), packed)
    close((loss, grads), quick(jax.value_and_grad(apart))(model(mixer)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "`label_smoothing` must be within"),
        ({"z_loss": -1.0}, "`z_loss` must be finite"),
        ({"chunk": 0}, "`chunk` must be an integer"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training.next_token_loss(model(), batch_of(0), **options)
