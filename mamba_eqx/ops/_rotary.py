import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "*#batch features"],
    cos: Float[Array, "*#batch pairs"],
    sin: Float[Array, "*#batch pairs"],
    *,
    interleaved: bool,
) -> Float[Array, "*batch features"]:
    r"""Turns pairs of features, each by an angle of its own (rotary embedding: Su et al., 2021),

    $$(a, b) \mapsto (a \cos\theta_i - b \sin\theta_i,\; a \sin\theta_i + b \cos\theta_i).$$

    Features that are in no pair pass as they are.

    **Arguments:**

    - `x`: the features.
    - `cos`, `sin`: of the angles $\theta_i$; at most one for two features.
    - `interleaved`: whether pair $i$ is of neighbours, $(2i, 2i + 1)$, or else of features half the
        width of `x` apart, $(i, i + \lfloor\texttt{features} / 2\rfloor)$. That is the whole width
        even if only some features are turned: to have all pairs among the first features, give
        those alone.

    **Returns:**

    The turned features, in the dtype that `x`, `cos` and `sin` share.
    """
    pairs, features = cos.shape[-1], x.shape[-1]
    if 2 * pairs > features:
        raise ValueError(
            f"{pairs} angles turn {2 * pairs} features, but the array has {features} of them."
        )
    if interleaved:
        a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    else:
        a, b = x[..., :pairs], x[..., features // 2 : features // 2 + pairs]
    a, b = a * cos - b * sin, a * sin + b * cos
    rest = jnp.broadcast_to(x, (*a.shape[:-1], features))
    if interleaved:
        turned = jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], 2 * pairs)
        return jnp.concatenate([turned, rest[..., 2 * pairs :]], axis=-1)
    middle, end = rest[..., pairs : features // 2], rest[..., features // 2 + pairs :]
    return jnp.concatenate([a, middle, b, end], axis=-1)
