"""The training step: gradients, accumulation, carry, precision and non-finite steps."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.configs import CONFIGS
from tests.support.registry import EVERYTHING, SIZES
from tests.support.training import ROWS, SEQ, VOCAB, batch_of, close, model as mamba


pytestmark = pytest.mark.usefixtures("compile_fast")

F16 = jnp.float16
SGD = optax.sgd(1.0)  # The new parameters are the old ones minus the gradient.


@functools.cache
def model():
    """Returns a small model with a state, which compiles fast."""
    conv = mbx.CausalConv1d(8, 4, use_bias=True, dtype=jnp.dtype(jnp.float32), key=jr.key(0))
    return mbx.LanguageModel(mbx.Unrolled([conv]), vocab_size=VOCAB, key=jr.key(1))


GRADIENT = eqx.filter_jit(eqx.filter_grad(training.next_token_loss, has_aux=True))


def gradient_of(batch, carry=None, of=model):
    return GRADIENT(of(), batch, carry)[0]


def after(step, *batches, rows=None, of=model):
    state = step.init(of(), rows=rows, key=jr.key(0))
    metrics = {}
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def test_step_applies_the_gradient():
    batch = batch_of(0)
    state, metrics = after(training.TrainStep(SGD), batch)
    grads = gradient_of(batch)
    close(state.model, jax.tree.map(jnp.subtract, model(), grads))
    close(metrics["gradient_norm"], optax.tree.norm(grads))
    assert int(metrics["weight"]) == int(batch.mask.sum())
    assert int(state.step) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(rows):
    batch = batch_of(1, rows=4)
    # The two groups have different numbers of targets.
    batch = batch._replace(mask=jnp.asarray(batch.mask).at[:2].set(False).at[0, 3].set(True))
    whole, metrics = after(training.TrainStep(SGD), batch, batch, rows=rows)
    parts, others = after(training.TrainStep(SGD, accumulate=2), batch, batch, rows=rows)
    close((parts.model, parts.carry, others), (whole.model, whole.carry, metrics))


def test_carry_continues_from_batch_to_batch():
    """Two consecutive pieces of a text, with the model unchanged between them."""
    long = batch_of(2, seq=2 * SEQ)
    pieces = [training.Batch(*(a[:, at : at + SEQ] for a in long)) for at in (0, SEQ)]
    still = training.TrainStep(optax.set_to_zero())
    state, metrics = after(still, *pieces, rows=ROWS)
    _, aux = jax.jit(training.next_token_loss)(model(), long)
    close(state.carry, aux.carry)
    # The gradient is that of the second piece, starting from the state after the first.
    _, first = jax.jit(training.next_token_loss)(model(), pieces[0])
    close(metrics["gradient_norm"], optax.tree.norm(gradient_of(pieces[1], first.carry)))


@pytest.mark.slow
def test_gradient_within_window_is_exact():
    """If only the second piece counts and starts with a reset, the first one has no effect."""
    long = batch_of(2, seq=2 * SEQ)
    cut = long._replace(
        mask=jnp.asarray(long.mask).at[:, :SEQ].set(False),
        reset=jnp.asarray(long.reset).at[:, SEQ].set(True),
    )
    second = training.Batch(*(a[:, SEQ:] for a in cut))
    _, aux = jax.jit(training.next_token_loss)(model(), long)
    close(gradient_of(second, aux.carry), gradient_of(cut))


@pytest.mark.slow
def test_computes_in_bfloat16_and_updates_in_float32():
    batch = batch_of(3)
    half = training.TrainStep(SGD, compute_dtype=jnp.bfloat16)
    state, _ = after(half, batch, rows=ROWS, of=mamba)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype(jnp.float32)}
    grads = jax.tree.map(jnp.subtract, mamba(), state.model)
    wanted = gradient_of(batch, of=mamba)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, grads, wanted))
    # The gradients differ from those in float32, but within the 8 bits of bfloat16.
    assert 1e-4 < error / optax.tree.norm(wanted) < 0.05
    empty = training.empty_carry(mbx.cast(mamba(), jnp.bfloat16), ROWS)
    assert jax.tree.map(lambda a: a.dtype, state.carry) == jax.tree.map(lambda a: a.dtype, empty)


def tiny_gradients(model, batch, carry, key):
    """A loss whose gradients are smaller than any number of float16."""
    loss, aux = training.next_token_loss(model, batch, carry)
    return loss * 1e-6, aux


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_float16_regains_small_gradients_by_scaling(accumulate):
    batch = batch_of(3, rows=2)
    step = training.TrainStep(SGD, tiny_gradients, compute_dtype=jnp.float16, accumulate=accumulate)
    state, metrics = after(step, batch)
    assert int(state.skipped) == 0
    assert float(metrics["loss_scale"]) == 2.0**16
    grads = eqx.filter_grad(lambda model: tiny_gradients(model, batch, None, None)[0])(model())
    norm = optax.tree.norm(grads)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=0.01)
    # Without scaling most of them are lost.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model())
    unscaled = eqx.filter_grad(lambda half: tiny_gradients(half, batch, None, None)[0])(half)
    lost = [np.mean(leaf == 0) for leaf in jax.tree.leaves(unscaled)]
    assert np.mean(lost) > 0.5 > np.mean([np.mean(leaf == 0) for leaf in jax.tree.leaves(grads)])


def test_loss_scale_follows_torch():
    """The scale is halved after an overflow, and doubled after 2000 steps without one."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    overflows = set(rng.integers(0, 9000, 4).tolist()) | {0, 1, 2}
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scale, tracker = torch.full((), 2.0**16), torch.zeros((), dtype=torch.int32)

    def run(scale, finite):
        scale = scale.next(finite)
        return scale, scale.scale

    finite = jnp.asarray([i not in overflows for i in range(9000)])
    _, ours = jax.lax.scan(run, training.LossScale.init(), finite)
    want = []
    for ok in np.asarray(finite):
        torch._amp_update_scale_(
            scale,
            tracker,
            torch.full((), float(not ok)),
            theirs.get_growth_factor(),
            theirs.get_backoff_factor(),
            theirs.get_growth_interval(),
        )
        want.append(float(scale))
    np.testing.assert_array_equal(ours, want)
    assert len(set(want)) > 3


@pytest.mark.slow
def test_overflow_in_float16_is_skipped_and_halves_the_scale():
    def loss(model, batch, carry, key):
        value, aux = training.next_token_loss(model, batch, carry)
        return value * 1e6, aux

    step = training.TrainStep(SGD, loss, compute_dtype=jnp.float16)
    state, metrics = after(step, batch_of(0))
    assert (int(state.skipped), float(metrics["loss_scale"])) == (1, 2.0**16)
    assert eqx.tree_equal(state.model, model())
    assert state.loss_scale is not None
    assert state.loss_scale.scale == 2.0**15
    assert after(training.TrainStep(SGD), batch_of(0))[0].loss_scale is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_batches_of_any_integer_dtype(dtype):
    batch = batch_of(0)
    other = batch._replace(
        tokens=batch.tokens.astype(dtype), targets=np.asarray(batch.targets).astype(dtype)
    )
    step = training.TrainStep(SGD)
    got, want = (after(step, b)[0].model for b in (other, batch))
    assert eqx.tree_equal(got, want)


@pytest.mark.slow
def test_batches_of_empty_sequences():
    """A step without tokens changes nothing and is finite."""
    for of in (model, mamba):
        state, metrics = after(training.TrainStep(SGD), batch_of(0, seq=0), rows=ROWS, of=of)
        assert (float(metrics["loss"]), int(metrics["weight"])) == (0, 0)
        assert int(state.skipped) == 0
        assert eqx.tree_equal(state.model, of())


@pytest.mark.slow
def test_state_with_a_shared_array():
    """An array in two places of the state is donated once."""
    step = training.TrainStep(SGD, average_decay=0.5)
    state = step.init(model(), key=jr.key(0))
    state = eqx.tree_at(lambda s: s.average, state, state.model)
    state, _ = step(state, batch_of(0))
    assert int(state.step) == 1


def test_average_is_exponential_moving_average():
    batch = batch_of(4)
    state, _ = after(training.TrainStep(SGD, average_decay=0.75), batch, batch)
    once, _ = after(training.TrainStep(SGD), batch)
    twice, _ = after(training.TrainStep(SGD), batch, batch)
    mix = lambda a, b, c: 0.75**2 * a + 0.75 * 0.25 * b + 0.25 * c
    close(state.average, jax.tree.map(mix, model(), once.model, twice.model))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_non_finite_step_changes_nothing(fault):
    class Marked(eqx.Module):
        tokens: training.Batch
        bad: jax.Array

    def loss(model, batch, carry, key):
        value, aux = training.next_token_loss(model, batch.tokens, carry)
        if fault == "loss":
            return jnp.where(batch.bad[0], jnp.nan, 1.0) * value, aux
        square = jnp.sum(model.norm_f.weight) ** 2
        # The square root of 0 is finite, but its derivative is not.
        return value + jnp.sqrt(jnp.where(batch.bad[0], 0.0 * square, 1.0)), aux

    good = Marked(batch_of(5), jnp.zeros(ROWS, jnp.bool_))
    bad = Marked(batch_of(6), jnp.ones(ROWS, jnp.bool_))
    step = training.TrainStep(optax.adam(0.1), loss, average_decay=0.5)
    state, _ = after(step, good, rows=ROWS)
    before = jax.tree.map(np.array, (state.model, state.opt_state, state.carry, state.average))
    state, metrics = step(state, bad)
    assert int(state.skipped) == int(metrics["skipped"]) == 1
    assert int(state.step) == 2
    assert np.isfinite(metrics["loss"]) == (fault == "gradient")
    parts = lambda state: (state.model, state.opt_state, state.carry, state.average)
    for a, b in zip(*map(jax.tree.leaves, (parts(state), before)), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = step(state, good)
    assert int(state.skipped) == 1
    assert np.isfinite(metrics["loss"])
    assert (state.model.embedding.weight != before[0].embedding.weight).any()


@pytest.mark.slow
def test_trains_any_equinox_model_with_a_custom_loss():
    mlp = eqx.nn.MLP(3, 1, 8, 1, key=jr.key(0))  # Some of its leaves are functions.
    x = jr.normal(jr.key(1), (16, 3))
    seen = []

    def loss(model, batch, carry, key):
        seen.append(key)
        y = jax.vmap(model)(batch)[:, 0]
        return jnp.mean((y - batch[:, 0]) ** 2), training.LossAux(jnp.asarray(0.25), carry)

    step = training.TrainStep(optax.adam(1e-2), loss, accumulate=2)
    state = step.init(mlp, key=jr.key(2))
    losses = []
    for _ in range(20):
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2
    assert seen
    # The state contained a copy of the model.
    np.testing.assert_allclose(losses[0], loss(mlp, x, None, None)[0], rtol=1e-5)


@pytest.mark.slow
def test_steps_are_reproducible():
    """The same state gives the same result bit for bit, and each step has its own key."""
    drawn = []

    def loss(model, batch, carry, key):
        value, aux = training.next_token_loss(model, batch, carry)
        noise = jr.uniform(key)
        jax.debug.callback(lambda u: drawn.append(float(u)), noise)
        return value * (1.0 + noise), aux

    step = training.TrainStep(optax.adam(0.1), loss)
    ends = [after(step, batch_of(0), batch_of(1))[0] for _ in range(2)]
    jax.effects_barrier()
    assert eqx.tree_equal(ends[0].model, ends[1].model)
    assert len(set(drawn)) == 2


def names(mask):
    found = jax.tree_util.tree_leaves_with_path(mask)
    keys = [jax.tree_util.keystr(path, simple=True, separator=".") for path, yes in found if yes]
    return {
        ".".join(key.split(".")[-2 if key.endswith(".weight") else -1 :]).strip(".") for key in keys
    }


MATRICES = {"in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "fc1", "fc2", "lm_head"}
MATRICES |= {"fc1_latent", "fc2_latent"}
DECAYED = {f"{name}.weight" for name in MATRICES} | {"mimo_x", "mimo_z", "mimo_o"}
# The experts of a mixture.
DECAYED |= {"fc1", "fc2", "router.weight"}
# The scales of a quantised weight, which decays as they do.
DECAYED |= {"scale"}
# A convolution as a whole layer, alone or in a stack.
DECAYED |= {"weight", "1.weight"}

BUILT = {
    f"{name}{', stacked' * stacked}": functools.partial(config.build, stacked=stacked)
    for name, config in CONFIGS.items()
    for stacked in (False, True)
}
MADE = {
    f"layer {name}": lambda *, key, make=make: make(SIZES[0], jnp.dtype(jnp.float32), key)
    for name, make in EVERYTHING.items()
}


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", BUILT | MADE)
def test_decay_mask_selects_matrices(name, embeddings):
    skeleton = eqx.filter_eval_shape((BUILT | MADE)[name], key=jr.key(0))
    model = jax.tree.map(lambda leaf: np.broadcast_to(leaf.dtype.type(0), leaf.shape), skeleton)
    decayed = names(training.decay_mask(model, embeddings=embeddings))
    # The integers of quantised weights are not trained.
    there = names(jax.tree.map(eqx.is_inexact_array_like, model))
    wanted = DECAYED | {"embedding.weight"} if embeddings else DECAYED
    assert decayed == there & wanted
    assert decayed


@pytest.mark.slow
def test_recipe_matches_adamw_in_numpy():
    """The gradients have norms above and below the norm that they are clipped to."""
    rng = np.random.default_rng(0)
    w, m, v = {"w": rng.standard_normal((2, 3)).astype(np.float32)}, 0.0, 0.0
    optimiser = training.recipe(w, learning_rate=0.1, steps=12, warmup=4, final=0.01)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
        state = optimiser.init(w)
        for i in range(13):
            g = (rng.standard_normal((2, 3)) * 4.0 ** rng.integers(-2, 2)).astype(np.float32)
            updates, state = optimiser.update({"w": g}, state, w)
            cosine = (1 + np.cos(np.pi * (i - 4) / 8)) / 2
            rate = 0.1 * i / 4 if i < 4 else 0.01 + 0.09 * cosine
            g = g / max(1.0, np.linalg.norm(g))
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            adam = m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.95 ** (i + 1))) + 1e-8)
            want = -rate * (adam + 0.1 * w["w"])
            (update,) = jax.tree.leaves(updates)
            np.testing.assert_allclose(update, want, rtol=1e-4, atol=1e-7)


def test_metrics_contain_learning_rate_if_injected():
    class Line(eqx.Module):
        learning_rate: jax.Array  # A parameter that happens to have this name.

    def loss(model, batch, carry, key):
        return jnp.mean((batch - model.learning_rate) ** 2), training.LossAux(jnp.asarray(1), carry)

    line, told = Line(jnp.zeros(2)), []
    optimisers = training.recipe(line, learning_rate=0.5, steps=9, warmup=2), optax.adam(0.5)
    for optimiser in optimisers:
        step = training.TrainStep(optimiser, loss)
        state = step.init(line, key=jr.key(0))
        for _ in range(2):
            state, metrics = step(state, jnp.ones((3, 2)))
            told.append(float(metrics.get("learning_rate", jnp.nan)))
    np.testing.assert_allclose(told, [0.0, 0.25, np.nan, np.nan])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: training.recipe(model(), learning_rate=1.0, steps=5, warmup=5), "`warmup` must"),
        (lambda: training.recipe(model(), learning_rate=1e-6, steps=5), "`final` must"),
        (lambda: training.TrainStep(SGD, accumulate=0), "`accumulate` must be an integer"),
        (lambda: training.TrainStep(SGD, average_decay=1.0), "`average_decay` must"),
        (
            lambda: after(
                training.TrainStep(SGD), of=lambda: eqx.nn.Linear(2, 2, dtype=F16, key=jr.key(0))
            ),
            "`model` must not have float16 parameters",
        ),
        (lambda: after(training.TrainStep(SGD, accumulate=2), batch_of(0)), "got accumulate=2 and"),
    ],
    ids=["warmup", "final", "accumulate", "average", "float16", "rows"],
)
def test_invalid_options_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
