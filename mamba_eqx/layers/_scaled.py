from jaxtyping import Array, Float


def scaled(x: Float[Array, "*shape"], multiplier: float) -> Float[Array, "*shape"]:
    """Multiplies `x` by a static number, and adds no operation if the number is 1."""
    return x if multiplier == 1 else x * multiplier
