from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree


In = TypeVar("In", bound=PyTree)
Out = TypeVar("Out", bound=PyTree)
Point = TypeVar("Point", bound=PyTree)


def linear_map(
    derivative: Callable[[In], Out], transpose: Callable[[Out], In], tangents: In, like: Out
) -> Out:
    r"""Applies a linear map with a transpose of its own, in the rule of a `jax.custom_jvp`.

    The function then supports every mode of differentiation: forward mode runs `derivative`,
    reverse mode `transpose`. JAX has no transformable function for this, but one for linear
    systems whose solver has a transpose. With $L$ the map, the system

    $$\begin{pmatrix} 1 & 0 \\ -L & 1 \end{pmatrix}
      \begin{pmatrix} u \\ v \end{pmatrix} = \begin{pmatrix} t \\ 0 \end{pmatrix}$$

    has the solution $u = t$, $v = L t$.

    **Arguments:**

    - `derivative`: the map $L$. Second derivatives are JAX's own derivatives of it.
    - `transpose`: its transpose.
    - `tangents`: the argument of `derivative`.
    - `like`: a pytree of the structure, shapes and dtypes of the result.

    **Returns:**

    The result of `derivative`.
    """

    def system(point: tuple[In, Out]) -> tuple[In, Out]:
        t, y = _linked(point)
        return _linked((t, jax.tree.map(jnp.subtract, y, derivative(t))))

    def solve(_: object, point: tuple[In, Out]) -> tuple[In, Out]:
        t, y = point
        return t, jax.tree.map(jnp.add, y, derivative(t))

    def solve_transposed(_: object, point: tuple[In, Out]) -> tuple[In, Out]:
        t_bar, y_bar = point
        return jax.tree.map(jnp.add, t_bar, transpose(y_bar)), y_bar

    right_side = _linked((tangents, jax.tree.map(jnp.zeros_like, like)))
    return lax.custom_linear_solve(system, right_side, solve, solve_transposed)[1]


def _linked(point: Point) -> Point:
    """Returns the same values, each of which depends on all of them.

    In reverse mode, `custom_linear_solve` requires that its whole right-hand side depends on the
    differentiated arguments, which a tangent of another argument does not. XLA removes the zero.
    """
    zero = sum(jnp.where(False, jnp.sum(leaf), 0) for leaf in jax.tree.leaves(point))
    return jax.tree.map(lambda leaf: leaf + zero, point)
