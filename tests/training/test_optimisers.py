"""`TrainStep` makes the steps of a plain loop with every optimiser of optax that fits."""

import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib as oc
import pytest

from mamba_eqx import training


pytestmark = pytest.mark.usefixtures("compile_fast")

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
MODEL = eqx.nn.MLP(3, 2, 4, 1, key=jr.key(0))  # Some of its leaves are functions.
FIRST = jax.tree.map(lambda leaf: leaf.ndim > 1, eqx.filter(MODEL, eqx.is_array))


def adam():
    return optax.adam(0.1)


# Optimisers whose state contains the initial parameters.
HOLDING = {
    "prodigy": oc.prodigy,
    "mechanize": lambda: oc.mechanize(adam()),
    "cocob": oc.cocob,
    "dog": lambda: oc.dog(1.0),
    "sam": lambda: oc.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2),
    "schedule_free_sgd": lambda: oc.schedule_free_sgd(0.1),
}
# Optimisers with extra arguments.
EXTRA = {
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), oc.reduce_on_plateau(patience=1)),
    "polyak_sgd": optax.polyak_sgd,
    "scale_by_polyak": lambda: optax.chain(optax.scale_by_polyak(), optax.scale(-1.0)),
    "momo": oc.momo,
    "momo_adam": oc.momo_adam,
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    ),
    "backtracking, keeping gradients": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)
    ),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
    "opaque sam": lambda: oc.sam(
        optax.sgd(0.1), optax.sgd(0.1), sync_period=2, opaque_mode=True, reset_state=False
    ),
    "sophia": lambda: oc.sophia(0.1, update_interval=1),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(0.1),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.sgd(0.1), lambda step, value, **_: value < 10, forward_extra_args=True
    ),
}
NAMES = """
adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lion
nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop sgd
sign_sgd signum sm3 yogi contrib.acprop contrib.ademamix contrib.adopt contrib.dadapt_adamw
contrib.madgrad contrib.muon contrib.schedule_free_adamw contrib.simplified_ademamix
"""
USUAL = {
    name: lambda name=name: operator.attrgetter(name)(optax)(0.1) for name in NAMES.split()
} | {
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jr.key(0)),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "dowg": oc.dowg,
    "schedule_free": lambda: oc.schedule_free(optax.sgd(0.1), 0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(adam(), 3),
    "apply_every": lambda: optax.chain(adam(), optax.apply_every(2)),
    "ema": lambda: optax.chain(adam(), optax.ema(0.9)),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jr.key(0)), adam()),
    "MultiSteps": lambda: optax.MultiSteps(adam(), 2).gradient_transformation(),
    "skipping MultiSteps": lambda: optax.MultiSteps(
        adam(), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "masked": lambda: optax.masked(adam(), lambda _: FIRST),
    "flatten": lambda: optax.flatten(adam()),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), adam()),
    "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 5)),
    "multi_transform": lambda: optax.multi_transform(
        {True: adam(), False: optax.sgd(0.1)}, lambda _: FIRST
    ),
    "split_real_and_imaginary": lambda: oc.split_real_and_imaginary(adam()),
}


def value(model, x):
    return jnp.mean((jax.vmap(model)(x) - x[:, :2] ** 2) ** 2)


def loss(model, batch, carry, key):
    return value(model, batch), training.LossAux(jnp.asarray(len(batch)), carry)


def plain_steps(optimiser, taken):
    """Makes two steps without `TrainStep`."""
    params, static = eqx.partition(MODEL, eqx.is_inexact_array)
    value_fn = lambda params: value(eqx.combine(params, static), X)
    losses, state = [], jax.tree.map(jnp.asarray, optimiser.init(params))
    for _ in range(2):
        now, grad = jax.value_and_grad(value_fn)(params)
        extra: dict[str, Any] = {
            "value": now, "grad": grad, "value_fn": value_fn, "obj_fn": value_fn,
            "grad_fn": lambda params, _: jax.grad(value_fn)(params),
        }  # fmt: skip
        extra = {name: extra[name] for name in taken}
        updates, state = optimiser.update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
        losses.append(now)
    return losses, params


def compare(make, *taken, accumulate=1):
    with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
        losses, params = jax.jit(lambda: plain_steps(make(), taken))()
    step = training.TrainStep(make(), loss, accumulate=accumulate)
    state = step.init(MODEL, key=jr.key(0))
    got = []
    for _ in range(2):
        state, metrics = step(state, X)
        got.append(metrics["loss"])
    assert int(state.skipped) == 0
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    after = eqx.filter(state.model, eqx.is_inexact_array)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def some(names, *quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", some(HOLDING, "prodigy"))
def test_optimisers_that_hold_the_parameters(name):
    """A buffer can be donated once only."""
    compare(HOLDING[name])


@pytest.mark.parametrize("name", some(EXTRA, "reduce_on_plateau"))
@pytest.mark.parametrize("accumulate", some([1, 2], 1))
def test_optimisers_with_extra_arguments(name, accumulate):
    taken = {"opaque sam": ["grad_fn"], "sophia": ["obj_fn"], "injected": []}
    usual = ["value", "grad", "value_fn"] if name not in ("polyak_sgd", "momo") else ["value"]
    compare(EXTRA[name], *taken.get(name, usual), accumulate=accumulate)


@pytest.mark.slow
@pytest.mark.parametrize("name", USUAL)
def test_other_optimisers(name):
    compare(USUAL[name])
