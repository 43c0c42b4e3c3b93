"""Laws of the maps of single tokens (`AbstractMLP`)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.ops import assert_close


pytestmark = pytest.mark.usefixtures("compile_fast")

D = 5
EXPERTS: dict[str, dict[str, Any]] = {
    "softmax_of_chosen": {"n_experts": 4, "top_k": 2, "d_shared": 7},
    "softmax": {"n_experts": 4, "top_k": 3, "routing": "softmax"},
    "sigmoid": {
        "n_experts": 6,
        "top_k": 3,
        "routing": "sigmoid",
        "n_group": 3,
        "topk_group": 2,
        "scaling": 2.5,
        "gated": False,
        "d_shared": 2,
        "d_latent": 4,
    },
    "one_expert": {"n_experts": 1, "top_k": 1, "gated": False},
    "all_experts": {"n_experts": 3, "top_k": 3, "routing": "sigmoid", "renormalise": False},
}
MLPS = ["mlp", "gated_mlp", *EXPERTS]


def make(name: str, dtype: Any = None) -> Any:
    """Makes an MLP whose parameters are all random."""
    if name in EXPERTS:
        mlp = mbx.MixtureOfExperts(D, 3, dtype=dtype, key=jr.key(0), **EXPERTS[name])
    else:
        mlp = {"mlp": mbx.MLP, "gated_mlp": mbx.GatedMLP}[name](
            D, 3, bias=True, dtype=dtype, key=jr.key(0)
        )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), mlp)


def tokens(*shape: int, dtype: Any = None) -> jax.Array:
    return jr.normal(jr.key(1), (*shape, D), dtype)


def value_and_gradients(run: Any, mlp: Any, x: jax.Array) -> Any:
    def loss(args: Any) -> tuple[jax.Array, jax.Array]:
        y = run(*args)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, has_aux=True))((mlp, x))


every_mlp = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in MLPS]
)


@every_mlp
def test_tokens_are_mapped_one_by_one(name: str):
    """A sequence is each of its tokens alone, also under `vmap`, as are all gradients."""
    with jax.enable_x64(True):
        mlp, x = make(name), tokens(7)

        def alone(mlp: Any, x: jax.Array) -> jax.Array:
            return jnp.stack([mlp(token) for token in x])

        def batched(mlp: Any, x: jax.Array) -> jax.Array:
            return jax.vmap(mlp)(x)

        want = value_and_gradients(alone, mlp, x)
        assert_close(value_and_gradients(lambda mlp, x: mlp(x), mlp, x), want)
        assert_close(value_and_gradients(batched, mlp, x), want)


@every_mlp
def test_leading_axes(name: str):
    with jax.enable_x64(True):
        mlp, x = make(name), tokens(6)
        want = mlp(x)
        for shape in ((2, 3), (1, 6, 1)):
            assert_close(mlp(x.reshape(*shape, D)), want.reshape(*shape, D))
        assert mlp(x[:0]).shape == (0, D)
        sequences = x.reshape(2, 3, D)
        assert_close(jax.vmap(mlp)(sequences), want.reshape(2, 3, D))


@every_mlp
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_output_has_dtype_of_input(name: str, dtype: str):
    for parameters in ("bfloat16", "float32"):
        mlp = make(name, parameters)
        assert mlp(tokens(3, dtype=dtype)).dtype == dtype
        assert mlp(tokens(dtype=dtype)).dtype == dtype


@every_mlp
def test_forward_mode_matches_reverse_mode(name: str):
    with jax.enable_x64(True):
        mlp, x = make(name), tokens(4)
        tangents = jax.tree.map(lambda leaf: jnp.flip(leaf) + 1, (mlp, x))

        def loss(args: Any) -> jax.Array:
            return jnp.sum(jnp.sin(args[0](args[1])))

        _, forward = jax.jvp(loss, ((mlp, x),), (tangents,))
        products = jax.tree.map(jnp.vdot, jax.grad(loss)((mlp, x)), tangents)
        assert_close(forward, jnp.sum(jnp.stack(jax.tree.leaves(products))))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_mixture_is_weighted_sum_of_experts(name: str):
    """Every expert is an MLP of its own, and all are computed here."""
    with jax.enable_x64(True):
        mixture, x = make(name), tokens(7)
        routes = mixture.router(x)
        inputs = x if mixture.fc1_latent is None else mixture.fc1_latent(x)
        kind = mbx.GatedMLP if mixture.gated else mbx.MLP
        like = kind(inputs.shape[1], 3, key=jr.key(0))
        total = jnp.zeros_like(inputs)
        for e in range(mixture.router.n_experts):
            weights = (mixture.fc1[e], mixture.fc2[e])
            expert = eqx.tree_at(lambda m: (m.fc1.weight, m.fc2.weight), like, weights)
            factor = jnp.sum(jnp.where(routes.experts == e, routes.weights, 0.0), axis=1)
            total += factor[:, None] * expert(inputs)
        total = total if mixture.fc2_latent is None else mixture.fc2_latent(total)
        total = total if mixture.shared is None else total + mixture.shared(x)
        assert_close(mixture(x), total)


def router(logits: Any, n_experts: int, top_k: int, bias: Any = None, **options: Any) -> Any:
    """Returns the routes of one token with the given logits."""
    made = mbx.layers.Router(n_experts, n_experts, top_k, key=jr.key(0), **options)
    made = eqx.tree_at(lambda r: r.weight, made, jnp.eye(n_experts))
    if bias is not None:
        made = eqx.tree_at(lambda r: r.correction_bias, made, jnp.asarray(bias))
    return made(jnp.asarray(logits))


def test_routing_of_equal_experts_takes_the_first():
    assert router([1.0, 2.0, 2.0, 2.0], 4, 2).experts.tolist() == [1, 2]


def test_softmax_routings_differ_in_the_weights():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    chosen = router(logits, 4, 2)
    np.testing.assert_allclose(chosen.weights, [4 / 7, 3 / 7], rtol=1e-6)
    all_experts = router(logits, 4, 2, routing="softmax")
    np.testing.assert_allclose(all_experts.weights, [0.4, 0.3], rtol=1e-6)
    assert chosen.experts.tolist() == all_experts.experts.tolist() == [1, 3]
    np.testing.assert_allclose(chosen.logits, logits, rtol=1e-6)


def test_correction_bias_chooses_but_does_not_weight():
    scores = np.array([0.2, 0.4, 0.6, 0.8])
    logits = np.log(scores / (1 - scores))
    options = {"routing": "sigmoid", "scaling": 2.0}
    routes = router(logits, 4, 2, [0.5, 0.0, 0.0, 0.0], **options)
    assert routes.experts.tolist() == [3, 0]
    np.testing.assert_allclose(routes.weights, [1.6, 0.4], rtol=1e-6)
    kept = router(logits, 4, 2, renormalise=False, **options)
    np.testing.assert_allclose(kept.weights, [1.6, 1.2], rtol=1e-6)


def test_groups_are_ranked_by_their_two_best_experts():
    """The best expert of all is in a group that is not chosen."""
    logits = [4.0, -9.0, -9.0, 1.0, 1.1, -9.0, 0.0, 0.2, 0.1]
    options = {"routing": "sigmoid", "n_group": 3, "topk_group": 1}
    assert router(logits, 9, 2, **options).experts.tolist() == [4, 3]


def test_router_parameters_stay_wide():
    mixture = mbx.cast(make("sigmoid"), "bfloat16")
    assert mixture.router.weight.dtype == mixture.router.correction_bias.dtype == "float32"
    assert mixture.fc1.dtype == mixture.fc2.dtype == "bfloat16"
    made = make("sigmoid", "bfloat16")
    assert jax.tree.map(lambda a: a.dtype, made) == jax.tree.map(lambda a: a.dtype, mixture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "`top_k` must be at most `n_experts`, but got top_k=5 and n_experts=4"),
        ({"n_experts": 0}, "`n_experts` must be an integer of at least 1"),
        ({"routing": "best"}, "`routing` must be one of 'softmax_of_chosen', .*'best'"),
        ({"scaling": 2.0}, 'require routing="sigmoid", but got scaling=2.0 and routing=\'softma'),
        ({"renormalise": False}, 'require routing="sigmoid", but got renormalise=False and'),
        ({"routing": "sigmoid", "n_group": 3}, "`n_group` must divide `n_experts`"),
        ({"routing": "sigmoid", "n_group": 4}, "A group must have at least two experts"),
        ({"routing": "sigmoid", "n_group": 2, "topk_group": 3}, "`topk_group` must be at most"),
        ({"routing": "sigmoid", "n_group": 2, "top_k": 3}, "The 1 chosen groups have 2 experts"),
        ({"routing": "sigmoid", "scaling": -1.0}, "`scaling` must be a positive number"),
        ({"gated": 1}, "`gated` must be True or False"),
        ({"d_shared": 0}, "`d_shared` must be an integer of at least 1"),
        ({"d_latent": 2.0}, "`d_latent` must be an integer of at least 1"),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_options_are_checked(options: dict[str, Any], message: str):
    """The constructor and the config raise the same errors."""
    options = {"n_experts": 4, "top_k": 2} | options
    with pytest.raises(ValueError, match=message):
        mbx.MixtureOfExperts(D, 3, key=jr.key(0), **options)
    with pytest.raises(ValueError, match=message):
        mbx.MixtureOfExpertsConfig(3, **options)
