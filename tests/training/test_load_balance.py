"""The load-balancing loss of mixtures of experts."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support.cases import quick
from tests.support.training import ROWS, SEQ, VOCAB, batch_of, close, model


pytestmark = pytest.mark.usefixtures("compile_fast")

EXPERTS = mbx.MixtureOfExpertsConfig(3, n_experts=4, top_k=2)
MIXER = mbx.AttentionConfig(8, nheads=2)
BLOCK = mbx.BlockConfig(MIXER, mlp=EXPERTS)


@functools.cache
def mixture_model(*, stacked=False, remat=False, blocks=(BLOCK, BLOCK)):
    config = mbx.LanguageModelConfig(VOCAB, blocks)
    return config.build(stacked=stacked, remat=remat, key=jr.key(0), dtype=jnp.float32)


def direct(routes, mask):
    """The equation, one token after another."""
    chosen, probable = np.zeros(4), np.zeros(4)
    for layer in routes:
        for at in np.ndindex(mask.shape):
            if layer.routing == "sigmoid":
                scores = 1 / (1 + np.exp(-np.float64(layer.logits[at])))
            else:
                scores = np.exp(np.float64(layer.logits[at]))
            probable += float(mask[at]) * scores / scores.sum()
            for expert in np.asarray(layer.experts[at]):
                chosen[expert] += float(mask[at])
    return 4 * np.sum(chosen * probable) / (len(routes) * np.float64(mask).sum()) ** 2


@pytest.mark.parametrize("routing", ["softmax_of_chosen", "softmax", "sigmoid"])
@pytest.mark.parametrize("kind", [np.bool_, np.float32])
def test_load_balancing_loss_matches_its_equation(routing, kind):
    routers = [mbx.layers.Router(8, 4, 2, routing=routing, key=jr.key(i)) for i in range(2)]
    routes = [router(3 * jr.normal(jr.key(3), (ROWS, SEQ, 8))) for router in routers]
    mask = np.arange(ROWS * SEQ).reshape(ROWS, SEQ) % 3
    mask = mask.astype(kind)
    got = training.load_balancing_loss(routes, mask)
    np.testing.assert_allclose(got, direct(routes, mask), rtol=1e-6)
    everything = np.ones((ROWS, SEQ), np.bool_)
    got = training.load_balancing_loss(routes)
    np.testing.assert_allclose(got, direct(routes, everything), rtol=1e-6)


def test_padding_does_not_count():
    """Neither in the value nor, if it is NaN, in the gradient."""
    router = mbx.layers.Router(8, 4, 2, key=jr.key(0))
    routes = router(jr.normal(jr.key(1), (SEQ, 8)))
    real = np.arange(SEQ) < 6

    def loss(logits, routes, mask=None):
        return training.load_balancing_loss([eqx.tree_at(lambda r: r.logits, routes, logits)], mask)

    run = jax.value_and_grad(loss)
    padded = jnp.where(real[:, None], routes.logits, jnp.nan)
    value, grad = run(padded, routes, real)
    short = jax.tree.map(lambda leaf: leaf[:6], routes)
    want, want_grad = run(short.logits, short)
    close((value, grad[:6]), (want, want_grad), 1e-6)
    assert not np.any(grad[6:])
    nothing, zeros = run(padded, routes, np.zeros(SEQ, np.bool_))
    assert nothing == 0
    assert not np.any(zeros)


def test_even_routing_has_the_least_loss():
    """The sigmoids of equal logits are equal too."""
    experts = jnp.arange(8).reshape(4, 2) % 4
    for routing in ("softmax", "sigmoid"):
        even = mbx.layers.Routes(jnp.zeros((4, 4)), experts, jnp.ones((4, 2)), routing)
        np.testing.assert_allclose(training.load_balancing_loss([even]), 2, rtol=1e-6)


def test_updated_biases_even_out_the_loads():
    """Of 8 experts, of which one has the largest scores for every token at first."""
    router = mbx.layers.Router(6, 8, 2, routing="sigmoid", key=jr.key(0))
    x = jr.normal(jr.key(1), (512, 6)) + 1
    lean = eqx.tree_at(lambda r: r.weight, router, router.weight.at[3].set(0.5))

    @jax.jit
    def step(router, _):
        routes = router(x)
        counts = jnp.sum(routes.experts[..., None] == jnp.arange(8), axis=(0, 1))
        return training.update_correction_bias(router, [routes]), counts

    after, counts = jax.lax.scan(step, lean, None, length=600)
    counts = np.asarray(counts)
    assert counts[0].max() > 3 * 128
    # At the end, every step moves a few tokens, and the next one moves them back.
    assert np.all(np.abs(counts[-100:] - 128) < 0.1 * 128)
    np.testing.assert_array_equal(after.weight, lean.weight)


@pytest.mark.parametrize("stacked", [False, True])
def test_every_bias_moves_against_its_load(stacked):
    config = mbx.MixtureOfExpertsConfig(3, n_experts=4, top_k=2, routing="sigmoid")
    model = mixture_model(stacked=stacked, blocks=(mbx.BlockConfig(MIXER, mlp=config),) * 3)
    loads = np.array([[4, 0, 2, 2], [2, 2, 4, 0], [2, 2, 2, 2]])
    experts = [[[0, 2], [0, 2], [0, 3], [0, 3]], [[2, 0], [2, 0], [2, 1], [2, 1]]]
    experts.append([[0, 1], [0, 1], [2, 3], [2, 3]])
    # A fifth token, which does not count, chooses the first two experts.
    routes = [
        mbx.layers.Routes(jnp.zeros((5, 4)), jnp.array([*e, [0, 1]]), jnp.ones((5, 2)), "sigmoid")
        for e in experts
    ]
    got = training.update_correction_bias(model, routes, np.arange(5) < 4, rate=0.25)
    biases = [router.correction_bias for router in routers_of(got.layers.unstack())]
    np.testing.assert_array_equal(biases, 0.25 * np.sign(2 - loads))
    biases_of = lambda model: [router.correction_bias for router in routers_of(model)]
    assert eqx.tree_equal(eqx.tree_at(biases_of, got, biases_of(model)), model)


def test_every_stack_of_a_model_gets_its_own_routes():
    config = mbx.MixtureOfExpertsConfig(3, n_experts=4, top_k=1, routing="sigmoid")
    block = mbx.BlockConfig(MIXER, mlp=config)
    blocks = [block.build(key=jr.key(i), dtype=jnp.float32) for i in range(5)]
    flat = mbx.Unrolled(blocks)
    pairs = mbx.Unrolled([mbx.Stacked(blocks[:2]), blocks[2], mbx.Stacked(blocks[3:])])
    nested = mbx.Stacked([mbx.Stacked(blocks[:2]), mbx.Stacked(blocks[3:])])
    rng = np.random.default_rng(0)
    routes = [
        mbx.layers.Routes(
            jnp.zeros((9, 4)),
            jnp.asarray(rng.integers(4, size=(9, 1))),
            jnp.ones((9, 1)),
            "sigmoid",
        )
        for _ in blocks
    ]

    def biases(stack, routes):
        updated = training.update_correction_bias(stack, routes)
        shapes = [router.correction_bias.shape for router in routers_of(updated)]
        assert shapes == [router.correction_bias.shape for router in routers_of(stack)]
        return np.concatenate([r.correction_bias.reshape(-1, 4) for r in routers_of(updated)])

    want = biases(flat, routes)
    assert len(np.unique(want, axis=0)) > 3
    np.testing.assert_array_equal(biases(pairs, routes), want)
    outer = [0, 1, 3, 4]
    np.testing.assert_array_equal(biases(nested, [routes[i] for i in outer]), want[outer])


def routers_of(model):
    is_router = lambda node: isinstance(node, mbx.layers.Router)
    return [node for node in jax.tree.leaves(model, is_leaf=is_router) if is_router(node)]


@pytest.mark.usefixtures("as_users_run")
def test_wrong_arguments_of_the_update_are_refused():
    config = mbx.MixtureOfExpertsConfig(3, n_experts=4, top_k=2, routing="sigmoid")
    model = mixture_model(blocks=(mbx.BlockConfig(MIXER, mlp=config), BLOCK))
    routes = [router(jnp.ones((SEQ, 8))) for router in routers_of(model)]
    with pytest.raises(ValueError, match=r"one entry for every router .* got 1 entries for 2"):
        training.update_correction_bias(model, routes[:1])
    with pytest.raises(ValueError, match="`mask` must have the shape of the tokens"):
        training.update_correction_bias(model, routes, np.ones(SEQ + 1))
    with pytest.raises(ValueError, match=r"`rate` must be .* but got .*-1"):
        training.update_correction_bias(model, routes, rate=-1)
    with pytest.raises(ValueError, match=r'has none. Use experts with routing="sigmoid"'):
        training.update_correction_bias(mixture_model(), routes)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_unrolled_and_stacked_models_have_the_same_routes(remat):
    """In one pass, whose features and state are those of `backbone`."""
    tokens, reset = batch_of(0).tokens[0], batch_of(0).reset[0]
    stacked = mixture_model(stacked=True, remat=remat)
    unrolled = mixture_model(remat=remat)
    state = unrolled.init_state(max_len=SEQ)

    def run(model, state):
        return model.backbone_with_routes(tokens, state, reset=reset, length=7)

    features, after, routes = quick(run)(unrolled, state)
    plain = quick(lambda model, state: model.backbone(tokens, state, reset=reset, length=7))
    close((features, after), plain(unrolled, state))
    stacked_state = stacked.init_state(max_len=SEQ)
    stacked_features, stacked_after, stacked_routes = quick(run)(stacked, stacked_state)
    close((stacked_features, stacked_routes), (features, routes))
    close(stacked_after, plain(stacked, stacked_state)[1])
    assert len(routes) == len(stacked_routes) == 2

    # The routes are those of the tokens that the experts get.
    @quick
    def direct_routes(model):
        hidden = model.hidden_states(tokens, reset=reset, length=7)[0]
        block = model.layers.layers[1]
        mixed = block.mixer(jax.vmap(block.norm)(hidden), reset=reset, length=7)
        return block.mlp.router(jax.vmap(block.norm2)(hidden + mixed))

    want = direct_routes(unrolled)
    close(*(jax.tree.map(lambda leaf: leaf[:7], found) for found in (routes[1], want)))


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), ROWS])
def test_next_token_loss_adds_the_loss_of_all_rows(rows):
    """In one pass over the model, and with the gradients of two."""
    batch = batch_of(1, rows)
    balanced = functools.partial(training.next_token_loss, balance=0.5)

    def apart(model, batch, carry):
        loss, aux = training.next_token_loss(model, batch, carry)
        routes = jax.vmap(lambda t, s, r: model.backbone_with_routes(t, s, reset=r)[2])(
            batch.tokens, carry, batch.reset
        )
        return loss + 0.5 * training.load_balancing_loss(routes, batch.mask), aux

    mixture = mixture_model(blocks=(BLOCK, mbx.BlockConfig(MIXER)))
    empty = mixture.init_state(max_len=2 * SEQ)
    earlier = jax.vmap(lambda model, row: model.backbone(row, empty)[1], (None, 0))
    carry = quick(earlier)(mixture, batch_of(5, rows).tokens)
    got, want = (
        quick(jax.value_and_grad(f, has_aux=True))(mixture, batch, carry) for f in (balanced, apart)
    )
    close(got, want)
    plain, _ = quick(training.next_token_loss)(mixture, batch, carry)
    assert got[0][0] > plain + 0.1


@pytest.mark.slow
def test_balance_of_remat_and_stacked_models():
    batch = batch_of(2)
    balanced = functools.partial(training.next_token_loss, balance=0.5)
    run = quick(jax.value_and_grad(balanced, has_aux=True))
    (want, _), grads = run(mixture_model(), batch)
    (loss, _), stacked = run(mixture_model(stacked=True, remat=True), batch)
    close(loss, want)
    close(mbx.Unrolled(stacked.layers.unstack()).layers, grads.layers.layers)


@pytest.mark.slow
def test_packed_documents_balance_like_separate_documents():
    """Padding after the documents does not count."""
    documents = [np.asarray([1, 4, 2, 5, 3]), np.asarray([7, 2, 2, 9])]
    tokens, (reset, mask) = np.zeros((1, SEQ), np.int32), np.zeros((2, 1, SEQ), np.bool_)
    start, routes = 0, []
    run = quick(lambda model, tokens: model.backbone_with_routes(tokens)[2])
    mixture = mixture_model()
    for document in documents:
        stop = start + len(document)
        tokens[0, start:stop], reset[0, start], mask[0, start:stop] = document, True, True
        routes.append(run(mixture, jnp.asarray(document, jnp.int32)))
        start = stop
    batch = training.Batch(tokens, tokens, reset, mask)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routes)
    balanced = functools.partial(training.next_token_loss, balance=0.25)
    got = quick(balanced)(mixture, batch)[0] - quick(training.next_token_loss)(mixture, batch)[0]
    np.testing.assert_allclose(got, 0.25 * training.load_balancing_loss(joined), rtol=1e-5)


@pytest.mark.usefixtures("as_users_run")
def test_errors():
    with pytest.raises(ValueError, match=r"`balance` needs a model with experts.*balance=0\.1 and"):
        training.next_token_loss(model(), batch_of(0), balance=0.1)
    for wrong in (-1, float("nan"), True):
        with pytest.raises(ValueError, match=rf"`balance` must be a factor.*balance={wrong}\."):
            training.next_token_loss(mixture_model(), batch_of(0), balance=wrong)
    with pytest.raises(ValueError, match="needs the routes of at least one layer"):
        training.load_balancing_loss(())
    four, five = (mbx.layers.Router(8, n, 2, key=jr.key(0))(jnp.ones((SEQ, 8))) for n in (4, 5))
    with pytest.raises(ValueError, match="the same number of experts, but got layers of 4 and 5"):
        training.load_balancing_loss([four, five])
    with pytest.raises(ValueError, match=r"`mask` must have the shape .* \(3,\) .* \(10,\)"):
        training.load_balancing_loss([four], np.ones(3, np.bool_))
