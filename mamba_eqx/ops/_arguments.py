"""Validation of arguments that several ops have in common."""


def size_or_default(name: str, size: int | None, default: int) -> int:
    """Returns `size`, or `default` if it is `None`.

    **Arguments:**

    - `name`: the name of the argument, for the error.
    - `size`: a number of tokens per chunk or block.
    - `default`: the size to use for `None`.

    **Raises:** `ValueError` if `size` is less than 1.
    """
    if size is None:
        return default
    if size < 1:
        raise ValueError(f"`{name}` must be at least 1, but got {name}={size}.")
    return size


def check_groups(nheads: int, ngroups: int) -> None:
    """Validates that `nheads` heads can be divided into `ngroups` groups of equal size.

    **Raises:** `ValueError` if `ngroups` does not divide `nheads`.
    """
    if nheads % ngroups:
        raise ValueError(
            f"The number of groups must divide the number of heads, but got ngroups={ngroups} and "
            f"nheads={nheads}. Check the shapes of the arguments."
        )


def check_kv_heads(nheads: int, nheads_kv: int) -> None:
    """Validates that `nheads` query heads can share `nheads_kv` key and value heads equally.

    **Raises:** `ValueError` if `nheads_kv` does not divide `nheads`.
    """
    if nheads % nheads_kv:
        raise ValueError(
            "The number of heads of keys and values must divide the number of query heads, but got "
            f"{nheads_kv} and {nheads}."
        )
