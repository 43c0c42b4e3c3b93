def check_groups(nheads: int, ngroups: int) -> None:
    """**Raises:** `ValueError` if heads do not fall into groups of one size."""
    if nheads % ngroups:
        raise ValueError(
            "The groups of `B` and `C` must divide the heads of `x`, but got "
            f"ngroups={ngroups} and nheads={nheads}."
        )
