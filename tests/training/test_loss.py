"""The next-token loss against direct implementations of its equation."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.cases import precision, quick
from tests.support.training import ROWS, SEQ, VOCAB, batch_of, close, model


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize(
    ("chunk", "smoothing", "z_loss"), [(7, 0.3, 0.1), (10, 0.0, 0.1), (1024, 0.3, 0.0)]
)
def test_cross_entropy_matches_its_equation(chunk, smoothing, z_loss):
    """The reference is in float64 and computes only the targets that count."""
    batch = batch_of(chunk)
    wanted = np.zeros((ROWS, SEQ, VOCAB + 2))  # Padded rows are never a target.
    wanted[..., :VOCAB] = smoothing / VOCAB
    wanted += (1 - smoothing) * np.eye(VOCAB + 2)[batch.targets]
    head = model()

    def ours(features, weight):
        return training.cross_entropy(
            eqx.tree_at(lambda m: m.embedding.weight, head, weight),
            features,
            jnp.where(batch.mask, batch.targets, -7),  # May be invalid where masked.
            batch.mask,
            label_smoothing=smoothing,
            z_loss=z_loss,
            chunk=chunk,
        )

    def theirs(features, weight):
        logits = features[batch.mask] @ weight.T
        z = jnp.exp(logits).sum(-1, keepdims=True)
        loss = -jnp.sum(wanted[batch.mask] * jnp.log(jnp.exp(logits) / z), -1)
        return jnp.mean(loss + z_loss * jnp.log(z[:, 0]) ** 2)

    with precision("float64"):
        features = jr.normal(jr.key(1), (ROWS, SEQ, 8), jnp.float64)
        weight = jr.normal(jr.key(2), (VOCAB + 2, 8), jnp.float64)
        got, want = (quick(jax.value_and_grad(f, (0, 1)))(features, weight) for f in (ours, theirs))
        close(got, want, 1e-12)


@pytest.mark.parity
@pytest.mark.parametrize(("columns", "smoothing"), [(VOCAB, 0.2), (VOCAB + 2, 0.0)])
def test_cross_entropy_matches_torch(columns, smoothing):
    torch = pytest.importorskip("torch")
    head = model(rows=columns)
    features = jr.normal(jr.key(1), (SEQ, 8))
    targets = jr.randint(jr.key(2), (SEQ,), 0, VOCAB)
    mask = np.arange(SEQ) % 3 > 0
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(head.logits(features))),
        torch.tensor(np.where(mask, targets, -100).tolist()),
        label_smoothing=smoothing,
    )
    got = training.cross_entropy(head, features, targets, mask, label_smoothing=smoothing)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)


@pytest.mark.parity
def test_weights_and_ignored_targets_match_torch():
    """torch weights a target by its class, and ignores -100."""
    torch = pytest.importorskip("torch")
    head = model(rows=VOCAB)
    features = jr.normal(jr.key(1), (SEQ, 8))
    targets = np.asarray(jr.randint(jr.key(2), (SEQ,), 0, VOCAB))
    targets = np.where(np.arange(SEQ) % 4 == 1, -100, targets)
    weights = np.linspace(0.0, 2.0, VOCAB, dtype=np.float32)
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(head.logits(features))),
        torch.tensor(targets.tolist()),
        torch.from_numpy(weights),
    )
    mask = np.where(targets == -100, np.float32(7), weights[np.maximum(targets, 0)])
    got = training.cross_entropy(head, features, targets, mask, chunk=3)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    got = training.cross_entropy(head, features, targets, np.ones(SEQ, np.bool_))
    kept = targets != -100
    want = training.cross_entropy(head, features, np.where(kept, targets, 0), kept)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(
            pytest.param(d, marks=pytest.mark.slow)
            for d in ("float16", "bfloat16", "int8", "int32")
        ),
    ],
)
def test_weighted_mean(dtype):
    """The reference is in float64."""
    batch = batch_of(4)
    weights = (np.arange(ROWS * SEQ).reshape(ROWS, SEQ) % 4).astype(jnp.dtype(dtype))
    weights = weights if "int" in dtype else weights * jnp.dtype(dtype).type(0.25)
    loss, aux = quick(training.next_token_loss)(model(), batch._replace(mask=weights))
    rows = zip(batch.tokens, batch.reset, strict=True)
    logits = np.stack([model().scan(row, reset=reset)[0] for row, reset in rows]).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    losses = log_z - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
    exact = weights.astype(np.float64)
    np.testing.assert_allclose(loss, np.sum(exact * losses) / exact.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux.weight, exact.sum())


def test_ignored_targets_do_not_count():
    """They count neither in the loss nor in the weight of the batch."""
    batch = batch_of(5)
    ignored = np.arange(SEQ) % 3 == 0
    run = quick(training.next_token_loss)
    got = run(model(), batch._replace(targets=jnp.where(ignored, -100, batch.targets)))
    want = run(model(), batch._replace(mask=np.asarray(batch.mask) & ~ignored))
    close(got, want, 1e-6)
    assert int(got[1].weight) == int(want[1].weight)


@pytest.mark.parametrize("target", [-1, -VOCAB, -99, VOCAB + 2, 2**20])
def test_invalid_targets_give_nan(target):
    """They are not taken for other tokens."""
    features = jnp.ones((SEQ, 8))
    targets = np.zeros(SEQ, np.int32)
    targets[3] = target
    counts = np.ones(SEQ, np.bool_)
    assert jnp.isnan(training.cross_entropy(model(), features, targets, counts))
    counts[3] = False
    assert jnp.isfinite(training.cross_entropy(model(), features, targets, counts))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_targets_of_any_integer_dtype(dtype):
    features = jr.normal(jr.key(1), (SEQ, 8))
    targets, mask = np.arange(SEQ) % VOCAB, np.arange(SEQ) % 4 > 0
    got, want = (
        training.cross_entropy(model(), features, targets.astype(kind), mask)
        for kind in (dtype, "int32")
    )
    np.testing.assert_array_equal(got, want)


def test_nan_in_masked_features_reaches_no_gradient():
    features = jr.normal(jr.key(1), (SEQ, 8))
    targets, mask = np.arange(SEQ) % VOCAB, np.arange(SEQ) % 2 > 0
    run = quick(jax.value_and_grad(training.cross_entropy, argnums=(0, 1)))
    got = run(model(), jnp.where(mask[:, None], features, jnp.nan), targets, mask)
    close(got, run(model(), jnp.where(mask[:, None], features, 0.0), targets, mask), 1e-6)


def test_loss_of_empty_sequences_is_zero():
    none = np.zeros((ROWS, 0), np.int32)
    loss = training.cross_entropy(model(), jnp.ones((ROWS, 0, 8)), none, none == 0)
    assert loss == 0


def test_shapes_that_differ_raise():
    with pytest.raises(ValueError, match=r"`mask` must .*, but got \(10,\) and \(3, 10\)"):
        training.next_token_loss(model(), batch_of(0)._replace(mask=np.ones(SEQ, np.bool_)))


def test_full_logits_are_never_materialised():
    """Neither the forward nor the reverse pass contains an array of them."""
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
def test_next_token_loss_is_mean_over_independent_rows(rows):
    batch = batch_of(3, rows)
    carry = training.empty_carry(model(), rows)
    loss, aux = quick(training.next_token_loss)(model(), batch, carry)
    total = 0.0
    for row in range(rows):
        logits, state = model().scan(batch.tokens[row], reset=batch.reset[row])
        log_probs = jax.nn.log_softmax(logits)
        right = log_probs[jnp.arange(SEQ), batch.targets[row]]
        total -= float(jnp.sum(jnp.where(batch.mask[row], right, 0.0)))
        close(jax.tree.map(lambda leaf, row=row: leaf[row], aux.carry), state)
    assert int(aux.weight) == int(batch.mask.sum())
    np.testing.assert_allclose(float(loss) * int(aux.weight), total, rtol=1e-5)


def test_loss_is_zero_without_targets():
    batch = batch_of(0)._replace(mask=jnp.zeros((ROWS, SEQ), jnp.bool_))
    run = quick(jax.value_and_grad(training.next_token_loss, has_aux=True))
    (loss, _), grads = run(model(), batch)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "mixer",
    [
        pytest.param(mbx.Mamba1Config(8, d_state=4), id="mamba1", marks=pytest.mark.slow),
        pytest.param(mbx.AttentionConfig(8, nheads=2), id="attention"),
    ],
)
def test_packed_documents_match_separate_documents(mixer):
    """Both the loss and its gradient are compared."""
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
            log_probs = jax.nn.log_softmax(model(jnp.asarray(d[:-1])))
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
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        training.next_token_loss(model(), batch_of(0), **options)
