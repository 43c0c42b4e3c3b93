"""The training step: gradients, updates, and the complete state of a run."""

import inspect
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_positive
from ..layers import cast
from ._gradients import Gradient, Groups, mean_loss, scaled_gradient
from ._loss import LossAux, empty_carry, next_token_loss
from ._loss_scale import LossScale
from ._row_sharding import Shardings, rows_sharded


@runtime_checkable
class Loss(Protocol):
    """A loss function, which returns the mean over a batch and a [`mamba_eqx.training.LossAux`][].

    To set options of [`mamba_eqx.training.next_token_loss`][], wrap it in a function with the
    arguments below.
    """

    def __call__(
        self, model: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray, /
    ) -> tuple[Float[Array, ""], LossAux]:
        """Computes the loss of a batch.

        **Arguments:**

        - `model`: the model, in the dtype to compute in. Gradients are with respect to it.
        - `batch`: the batch, or a group of its rows.
        - `carry`: the state of each row before the batch; `None` if none is carried.
        - `key`: a PRNG key, different for each step and each group.

        **Returns:**

        The loss, a scalar, and a [`mamba_eqx.training.LossAux`][].
        """
        ...


class TrainState(eqx.Module):
    """The complete state of a training run, an ordinary pytree.

    A run that resumes from this state continues exactly as if it had not been interrupted; see
    [`mamba_eqx.training.Checkpoints`][].
    """

    model: PyTree
    """The model that is optimised, in full precision."""

    opt_state: PyTree
    """The state of the optimiser."""

    carry: PyTree | None
    """The states of the layers after the last batch, with a first axis of rows; or `None`."""

    average: PyTree | None
    """The exponential moving average of the model, or `None`."""

    step: Int[Array, ""]
    """The number of completed steps, skipped ones included."""

    skipped: Int[Array, ""]
    """The number of steps skipped because the loss or the gradient was not finite."""

    key: PRNGKeyArray
    """The key for losses that draw random numbers: each step gets `fold_in(key, step)`."""

    loss_scale: LossScale | None = None
    """The factor of the loss if the model is computed in float16, or `None`."""


class TrainStep:
    r"""A compiled training step: `state, metrics = train_step(state, batch)`.

    - *Gradient accumulation*: the rows of a batch go through the model in groups, one after
      another, so that the memory for one group suffices. The result is the gradient of the whole
      batch: groups are weighted by the number of targets that count in them. (The only exception is
      `balance` of [`mamba_eqx.training.next_token_loss`][], which is no mean over targets: every
      group is balanced by itself.)
    - *Mixed precision*: the step runs a copy of the model in `compute_dtype`, made by
      [`mamba_eqx.cast`][], which keeps the recurrences in float32. Gradients, moments and updates
      have the dtype of the model. In float16 the loss is scaled, so that small gradients are not
      lost ([`mamba_eqx.training.LossScale`][]), which skips some of the first steps. bfloat16 needs
      no scaling.
    - *Truncated backpropagation through time*: with a `carry`, each row of a batch continues where
      the same row of the previous batch ended. Gradients stop at the start of the batch.
      `batch.reset` marks where a row starts something new instead.
    - *Moving average* of the parameters, starting from the initial parameters:
      $\bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta$.
    - *Non-finite steps*: if the loss or the norm of the gradient is infinite or NaN, the model, the
      optimiser's state, the average and the carry keep their values, and the step counts as
      `skipped`.
    - *Extra arguments of optimisers*: `update` is given the loss as `value`, the gradient as `grad`
      and the loss as a function of the parameters as `value_fn`, if the optimiser takes them, as
      `optax.contrib.reduce_on_plateau`, `optax.polyak_sgd` and `optax.lbfgs` do. SAM is given its
      `grad_fn` and Sophia its `obj_fn`, of the same batch.

    - *Several devices*: the state and the rows of a batch may be sharded over a mesh. The new state
      has the shardings of the old one. If only the rows are sharded, devices exchange nothing but
      gradients.

    The step donates the state passed to it: do not use that state again.
    """

    def __init__(
        self,
        optimiser: optax.GradientTransformation,
        loss: Loss | None = None,
        *,
        accumulate: int = 1,
        compute_dtype: DTypeLike | None = None,
        average_decay: float | None = None,
    ):
        r"""**Arguments:**

        - `optimiser`: an optax optimiser, for instance [`mamba_eqx.training.recipe`][]. It must
            transform the gradient of the whole batch; optimisers of gradients per example, such as
            `optax.contrib.dpsgd`, are not supported.
        - `loss`: a [`mamba_eqx.training.Loss`][], called as `loss(model, batch, carry, key)`. By
            default [`mamba_eqx.training.next_token_loss`][], which ignores the key.
        - `accumulate`: the number of groups that the rows of a batch are split into. It must divide
            the number of rows.
        - `compute_dtype`: the dtype to compute in, such as `jax.numpy.bfloat16`; by default the
            dtype of the model.
        - `average_decay`: $\beta$, within `0 <= beta < 1`; `None` for no average.

        **Raises:** `ValueError` for an argument out of range.
        """
        check_positive("accumulate", accumulate)
        if average_decay is not None and not 0 <= average_decay < 1:
            raise ValueError(
                f"`average_decay` must be within 0 <= average_decay < 1, but got {average_decay}."
            )
        self.optimiser = optimiser
        self.loss = _next_token_loss if loss is None else loss
        self.accumulate = accumulate
        self.compute_dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
        self.average_decay = average_decay
        self._run = eqx.filter_jit(self._step, donate="all-except-first")

    def init(self, model: PyTree, *, rows: int | None = None, key: PRNGKeyArray) -> TrainState:
        """Returns the state before the first step, which contains a copy of the model.

        **Arguments:**

        - `model`: the model, in the dtype in which it is optimised, usually float32.
        - `rows`: the number of rows of a batch, if the states of the layers are carried from batch
            to batch; `None` starts every batch from the empty state.
        - `key`: the key for losses that draw random numbers.

        **Returns:**

        A [`mamba_eqx.training.TrainState`][].

        **Raises:** `ValueError` if a parameter of the model is float16, in which small updates are
        lost.
        """
        if any(eqx.is_array(leaf) and leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(model)):
            raise ValueError(
                "`model` must not have float16 parameters, because small gradients and updates are "
                "zero in float16. Optimise the model in float32, `cast(model, jnp.float32)`, and "
                "compute in float16 by `compute_dtype=jnp.float16`."
            )
        copy = lambda leaf: jnp.copy(leaf) if eqx.is_array(leaf) else leaf
        model = jax.tree.map(copy, model)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
            opt_state = self.optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        return TrainState(
            model=model,
            opt_state=opt_state,
            carry=None if rows is None else empty_carry(self._computing(model), rows),
            average=None if self.average_decay is None else jax.tree.map(copy, model),
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            key=jnp.copy(key),
            loss_scale=LossScale.init() if self.compute_dtype == jnp.float16 else None,
        )

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        """Makes one training step.

        **Arguments:**

        - `state`: the result of `init` or of the previous step.
        - `batch`: a [`mamba_eqx.training.Batch`][], or whatever the loss takes. The first axis of
            each of its arrays is the rows.

        **Returns:**

        The new state, and the metrics, all scalars: `loss`, `gradient_norm` (before clipping),
        `weight` (the number of targets that counted) and `skipped` (the number of steps skipped so
        far). `learning_rate` is added if the optimiser's state contains it, as with
        [`mamba_eqx.training.recipe`][] and any optimiser made by `optax.inject_hyperparams`, and
        `loss_scale` in float16.

        **Raises:** `ValueError` if `accumulate` does not divide the number of rows of the batch.
        """
        rows = len(jax.tree.leaves(batch)[0])
        if rows % self.accumulate:
            raise ValueError(
                f"`accumulate` must divide the rows of a batch, but got accumulate="
                f"{self.accumulate} and {rows} rows."
            )
        placed = Shardings.of(batch, state)
        return self._run(batch, _without_shared_buffers(state), placed)

    def _computing(self, model: PyTree) -> PyTree:
        """Returns the model in the dtype to compute in."""
        return model if self.compute_dtype is None else cast(model, self.compute_dtype)

    def _step(
        self, batch: PyTree, state: TrainState, placed: Shardings | None
    ) -> tuple[TrainState, dict[str, Array]]:
        with rows_sharded(None if placed is None else placed.rows):
            new_state, metrics = self._updated(batch, state)
        return new_state if placed is None else placed.constrain(new_state), metrics

    def _updated(self, batch: PyTree, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        params, static = eqx.partition(state.model, eqx.is_inexact_array)

        def loss_of(
            params: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray
        ) -> tuple[Array, LossAux]:
            return self.loss(self._computing(eqx.combine(params, static)), batch, carry, key)

        inputs = Groups(batch, state.carry, jr.fold_in(state.key, state.step))
        found = scaled_gradient(loss_of, params, inputs, self.accumulate, state.loss_scale)
        norm = optax.tree.norm(found.grads)

        def value_fn(params: PyTree, *, obj_fn: object = None, grad_fn: object = None) -> Array:
            # Line searches refuse arguments that neither they nor this function take.
            return mean_loss(loss_of, params, inputs, self.accumulate)

        with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
            updates, opt_state = self.optimiser.update(
                found.grads,
                state.opt_state,
                params,
                **self._extra_arguments(found, value_fn),
            )
            params = optax.apply_updates(params, updates)
        model = eqx.combine(params, static)
        average = state.average
        if average is not None and self.average_decay is not None:
            new, old = eqx.filter((model, average), eqx.is_inexact_array)
            mixed = optax.incremental_update(new, old, 1 - self.average_decay)
            average = eqx.combine(mixed, model)
        finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
        model, opt_state, average, carry = _select(
            finite,
            (model, opt_state, average, None if state.carry is None else found.carry),
            (state.model, state.opt_state, state.average, state.carry),
        )
        skipped = state.skipped + (~finite).astype(jnp.int32)
        new_state = TrainState(
            model=model,
            opt_state=opt_state,
            carry=carry,
            average=average,
            step=state.step + 1,
            skipped=skipped,
            key=state.key,
            loss_scale=None if state.loss_scale is None else state.loss_scale.next(finite),
        )
        metrics = {
            "loss": found.loss,
            "gradient_norm": norm,
            "weight": found.weight,
            "skipped": skipped,
        }
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
        rates = optax.tree.get_all_with_path(opt_state, "learning_rate", _is_hyperparameter)
        if len(rates) == 1:
            metrics["learning_rate"] = rates[0][1]
        return new_state, metrics

    def _extra_arguments(
        self, found: Gradient, value_fn: Callable[..., Array]
    ) -> dict[str, object]:
        """Returns the arguments of `update` that the optimiser takes beside the usual ones."""
        extra = {
            "value": found.loss,
            "grad": found.grads,
            "value_fn": value_fn,  # of line searches
            "obj_fn": value_fn,  # of Sophia
            "grad_fn": lambda params, i: jax.grad(value_fn)(params),  # of SAM
        }
        if not isinstance(self.optimiser, optax.GradientTransformationExtraArgs):
            return {}
        taken = inspect.signature(self.optimiser.update).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            return extra
        return {name: value for name, value in extra.items() if name in taken}


def _without_shared_buffers(state: TrainState) -> TrainState:
    """Returns the state with copies in place of arrays that occur in more than one place.

    A buffer can be donated once only. States of optimisers such as `optax.contrib.prodigy` contain
    the initial parameters themselves.
    """
    seen: set[int] = set()

    def distinct(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, jax.Array):
            return leaf
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(distinct, state)


def _select(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Returns the arrays of `new` if the condition holds, and those of `old` otherwise."""
    return jax.tree.map(
        lambda new, old: jnp.where(condition, new, old) if eqx.is_array(new) else new, new, old
    )


def _next_token_loss(
    model: PyTree, batch: PyTree, carry: PyTree | None, key: PRNGKeyArray
) -> tuple[Float[Array, ""], LossAux]:
    return next_token_loss(model, batch, carry)


def _is_hyperparameter(path: KeyPath, _: object) -> bool:
    """Returns whether a leaf is in a state of `optax.inject_hyperparams`, rather than the moment of
    a parameter with the same name."""
    return any(getattr(key, "name", None) == "hyperparams" for key in path)
