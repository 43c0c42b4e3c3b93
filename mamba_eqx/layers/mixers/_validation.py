import math

from ..._checks import check_positive


def check_dt(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min <= dt_max, but got dt_min={dt_min} and "
            f"dt_max={dt_max}."
        )
    if not 0 < dt_init_floor < math.inf:
        raise ValueError(f"`dt_init_floor` must be positive, but got {dt_init_floor}.")


def check_dt_limit(dt_limit: tuple[float, float]) -> None:
    low, high = dt_limit
    if not (0 <= low <= high and high > 0 and low < math.inf):
        raise ValueError(
            "`dt_limit` must be the smallest and the largest step size, with 0 <= smallest <= "
            f"largest, but got {dt_limit}. `(0.0, math.inf)` is no limit."
        )


def check_select_norm(select_norm: str | None, eps: float) -> None:
    if select_norm not in (None, "weighted", "weightless"):
        raise ValueError(
            '`select_norm` must be "weighted" (as in Jamba), "weightless" (as in Falcon-Mamba) or '
            f"None, but got {select_norm!r}."
        )
    if not eps > 0:
        raise ValueError(f"`select_norm_eps` must be positive, but got select_norm_eps={eps}.")


def check_heads(channels: int, headdim: int, ngroups: int, *, name: str = "d_inner") -> None:
    check_positive("headdim", headdim)
    check_positive("ngroups", ngroups)
    if channels % headdim:
        default = "2 * d_model" if name == "d_inner" else "d_inner"
        raise ValueError(
            f"`headdim` must divide `{name}` ({default} by default), but got "
            f"headdim={headdim} and {name}={channels}."
        )
    nheads = channels // headdim
    if nheads % ngroups:
        raise ValueError(
            f"`ngroups` must divide the number of heads, `{name} / headdim`, but got "
            f"ngroups={ngroups} and {nheads} heads ({name}={channels}, headdim={headdim})."
        )


def check_d_ssm(d_ssm: int, d_inner: int) -> None:
    check_positive("d_ssm", d_ssm)
    if d_ssm > d_inner:
        raise ValueError(
            "`d_ssm` must be at most `d_inner`, the rest of which an MLP gets, but got "
            f"d_ssm={d_ssm} and d_inner={d_inner}."
        )


def check_attention(
    d_model: int,
    nheads: int,
    nheads_kv: int,
    headdim: int | None,
    d_conv: int,
    rotary_emb_dim: int,
    window: int | None,
) -> int:
    """**Returns:** `headdim`, which is `d_model / nheads` if it is `None`."""
    check_positive("d_model", d_model)
    check_positive("nheads", nheads)
    check_positive("nheads_kv", nheads_kv)
    if headdim is None:
        if d_model % nheads:
            raise ValueError(
                "`nheads` must divide `d_model` where no `headdim` is given, but got "
                f"nheads={nheads} and d_model={d_model}."
            )
        headdim = d_model // nheads
    check_positive("headdim", headdim)
    if nheads % nheads_kv:
        raise ValueError(
            f"`nheads_kv` must divide `nheads`, but got nheads_kv={nheads_kv} and nheads={nheads}."
        )
    if d_conv != 0:
        check_positive("d_conv", d_conv)
    if rotary_emb_dim != 0:
        check_positive("rotary_emb_dim", rotary_emb_dim)
    if rotary_emb_dim % 2 or rotary_emb_dim > headdim:
        raise ValueError(
            "`rotary_emb_dim` must be even and at most `headdim`, but got "
            f"rotary_emb_dim={rotary_emb_dim} and headdim={headdim}."
        )
    if window is not None:
        check_positive("window", window)
    return headdim


def check_rope_fraction(rope_fraction: float, d_state: int) -> None:
    if rope_fraction not in (0.5, 1):
        raise ValueError(
            "`rope_fraction` must be 0.5 or 1, the fraction of the state that is turned, but got "
            f"rope_fraction={rope_fraction!r}."
        )
    if int(d_state * rope_fraction) < 2:
        raise ValueError(
            "`d_state * rope_fraction` must be at least 2, a pair that is turned, but got "
            f"d_state={d_state} and rope_fraction={rope_fraction}."
        )


def check_A(A_activation: str, A_floor: float) -> None:
    if A_activation not in ("heavy_tail", "softplus"):
        raise ValueError(
            '`A_activation` must be "heavy_tail" or "softplus", but got '
            f"A_activation={A_activation!r}."
        )
    if not 0 < A_floor < math.inf:
        raise ValueError(
            f"`A_floor`, the smallest rate of decay, must be positive, but got A_floor={A_floor}."
        )
