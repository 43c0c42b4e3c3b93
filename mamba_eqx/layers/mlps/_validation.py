"""Validation of the options of MLPs, shared by the constructors and the configs."""

from typing import Literal, TypeAlias, get_args

from ..._checks import check_flag, check_positive, check_positive_number


Routing: TypeAlias = Literal["softmax_of_chosen", "softmax", "sigmoid"]


def check_routing(
    *,
    n_experts: int,
    top_k: int,
    routing: str,
    n_group: int,
    topk_group: int,
    renormalise: bool,
    scaling: float,
) -> None:
    """Validates the options of the router of `MixtureOfExperts`."""
    check_positive("n_experts", n_experts)
    check_positive("top_k", top_k)
    if top_k > n_experts:
        raise ValueError(
            f"`top_k` must be at most `n_experts`, but got top_k={top_k} and "
            f"n_experts={n_experts}. A token cannot have an expert twice."
        )
    if routing not in get_args(Routing):
        names = ", ".join(map(repr, get_args(Routing)))
        raise ValueError(f"`routing` must be one of {names}, but got routing={routing!r}.")
    check_positive("n_group", n_group)
    check_positive("topk_group", topk_group)
    check_flag("renormalise", renormalise)
    check_positive_number("scaling", scaling)
    if routing != "sigmoid":
        given = {"n_group": n_group, "topk_group": topk_group, "scaling": scaling}
        changed = [f"{name}={value}" for name, value in given.items() if value != 1]
        changed += [] if renormalise else ["renormalise=False"]
        if changed:
            raise ValueError(
                '`n_group`, `topk_group`, `renormalise` and `scaling` require routing="sigmoid", '
                f"but got {', '.join(changed)} and routing={routing!r}. Leave them out."
            )
    if n_experts % n_group:
        raise ValueError(
            f"`n_group` must divide `n_experts`, but got n_group={n_group} and "
            f"n_experts={n_experts}."
        )
    size = n_experts // n_group
    if n_group > 1 and size < 2:
        raise ValueError(
            "A group must have at least two experts, whose scores rank the group, but got "
            f"n_group={n_group} and n_experts={n_experts}. Use n_group=1 for no groups."
        )
    if topk_group > n_group:
        raise ValueError(
            f"`topk_group` must be at most `n_group`, but got topk_group={topk_group} and "
            f"n_group={n_group}."
        )
    if top_k > topk_group * size:
        raise ValueError(
            f"The {topk_group} chosen groups have {topk_group * size} experts, but got "
            f"top_k={top_k}. Increase `topk_group`, or decrease `top_k`."
        )


def check_mixture(
    *,
    d_intermediate: int,
    n_experts: int,
    top_k: int,
    routing: str,
    n_group: int,
    topk_group: int,
    renormalise: bool,
    scaling: float,
    gated: bool,
    d_shared: int | None,
    d_latent: int | None,
) -> None:
    """Validates the options of `MixtureOfExperts`, except for `d_model`."""
    check_positive("d_intermediate", d_intermediate)
    check_routing(
        n_experts=n_experts,
        top_k=top_k,
        routing=routing,
        n_group=n_group,
        topk_group=topk_group,
        renormalise=renormalise,
        scaling=scaling,
    )
    check_flag("gated", gated)
    if d_shared is not None:
        check_positive("d_shared", d_shared)
    if d_latent is not None:
        check_positive("d_latent", d_latent)
