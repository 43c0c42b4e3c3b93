"""Validation of the mixers' options, shared by the constructors of the mixers and their configs.

Each `check_<mixer>` raises a `ValueError` for options that the mixer does not support, and returns
the options that have a default computed from others.
"""

import math
from collections.abc import Sequence

from ..._checks import (
    check_flag,
    check_fraction,
    check_positive,
    check_positive_number,
    check_positive_numbers,
)


def check_mamba1(
    *,
    d_model: int,
    d_inner: int | None,
    d_state: int,
    d_conv: int,
    dt_rank: int | None,
    bias: bool,
    conv_bias: bool,
    select_norm: str | None,
    select_norm_eps: float,
) -> tuple[int, int]:
    """Validates the options of `Mamba1`.

    **Returns:**

    `d_inner` and `dt_rank`, with their defaults if they are `None`.
    """
    check_positive("d_model", d_model)
    d_inner = 2 * d_model if d_inner is None else d_inner
    dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
    check_positive("d_inner", d_inner)
    check_positive("d_state", d_state)
    check_positive("d_conv", d_conv)
    check_positive("dt_rank", dt_rank)
    check_flag("bias", bias)
    check_flag("conv_bias", conv_bias)
    if select_norm not in (None, "weighted", "weightless"):
        raise ValueError(
            '`select_norm` must be "weighted" (as in Jamba), "weightless" (as in Falcon-Mamba) or '
            f"None, but got select_norm={select_norm!r}."
        )
    check_fraction("select_norm_eps", select_norm_eps)
    return d_inner, dt_rank


def check_mamba2(
    *,
    d_model: int,
    d_inner: int | None,
    d_ssm: int | None,
    d_state: int,
    d_conv: int,
    headdim: int,
    ngroups: int,
    D_has_hdim: bool,
    dt_limit: tuple[float, float],
    bias: bool,
    conv_bias: bool,
    rms_norm: bool,
    norm_before_gate: bool,
    norm_eps: float,
    ssm_multipliers: tuple[float, ...],
) -> tuple[int, int]:
    """Validates the options of `Mamba2`.

    **Returns:**

    `d_inner` and `d_ssm`, with their defaults if they are `None`.
    """
    check_positive("d_model", d_model)
    d_inner = 2 * d_model if d_inner is None else d_inner
    check_positive("d_inner", d_inner)
    d_ssm = d_inner if d_ssm is None else d_ssm
    check_positive("d_ssm", d_ssm)
    if d_ssm > d_inner:
        raise ValueError(
            "`d_ssm` must be at most `d_inner`, since the other channels form an MLP, but got "
            f"d_ssm={d_ssm} and d_inner={d_inner}."
        )
    check_positive("d_state", d_state)
    check_positive("d_conv", d_conv)
    _check_heads("d_inner" if d_ssm == d_inner else "d_ssm", d_ssm, headdim, ngroups)
    check_flag("D_has_hdim", D_has_hdim)
    _check_dt_limit(dt_limit)
    check_flag("bias", bias)
    check_flag("conv_bias", conv_bias)
    check_flag("rms_norm", rms_norm)
    check_flag("norm_before_gate", norm_before_gate)
    if norm_before_gate and not rms_norm:
        raise ValueError(
            "`norm_before_gate=True` needs the norm, but got rms_norm=False. Set `rms_norm=True`."
        )
    check_fraction("norm_eps", norm_eps)
    check_positive_numbers("ssm_multipliers", ssm_multipliers, 5, "of `z`, `u`, `B`, `C` and `dt`")
    return d_inner, d_ssm


def check_mamba3(
    *,
    d_model: int,
    d_inner: int | None,
    d_state: int,
    headdim: int,
    ngroups: int,
    mimo_rank: int | None,
    rope_fraction: float,
    A_activation: str,
    A_floor: float,
    outproj_norm: bool,
    norm_eps: float,
) -> int:
    """Validates the options of `Mamba3`.

    **Returns:**

    `d_inner`, with its default if it is `None`.
    """
    check_positive("d_model", d_model)
    d_inner = 2 * d_model if d_inner is None else d_inner
    check_positive("d_inner", d_inner)
    check_positive("d_state", d_state)
    _check_heads("d_inner", d_inner, headdim, ngroups)
    if mimo_rank is not None:
        check_positive("mimo_rank", mimo_rank)
    check_positive_number("rope_fraction", rope_fraction)
    if rope_fraction not in (0.5, 1):
        raise ValueError(
            "`rope_fraction` must be 0.5 or 1, the fraction of the state to rotate, but got "
            f"rope_fraction={rope_fraction!r}."
        )
    if int(d_state * rope_fraction) < 2:
        raise ValueError(
            "`d_state * rope_fraction` must be at least 2, one rotated pair, but got "
            f"d_state={d_state} and rope_fraction={rope_fraction}."
        )
    if A_activation not in ("heavy_tail", "softplus"):
        raise ValueError(
            '`A_activation` must be "heavy_tail" or "softplus", but got '
            f"A_activation={A_activation!r}."
        )
    check_positive_number("A_floor", A_floor)
    check_flag("outproj_norm", outproj_norm)
    check_fraction("norm_eps", norm_eps)
    return d_inner


def check_gated_delta_net(
    *,
    d_model: int,
    d_inner: int | None,
    d_state: int,
    d_conv: int,
    headdim: int,
    ngroups: int | None,
    norm_eps: float,
) -> tuple[int, int]:
    """Validates the options of `GatedDeltaNet`.

    **Returns:**

    `d_inner` and `ngroups`, with their defaults if they are `None`.
    """
    check_positive("d_model", d_model)
    d_inner = 2 * d_model if d_inner is None else d_inner
    check_positive("d_inner", d_inner)
    check_positive("d_state", d_state)
    check_positive("d_conv", d_conv)
    check_positive("headdim", headdim)
    ngroups = max(1, d_inner // headdim) if ngroups is None else ngroups
    _check_heads("d_inner", d_inner, headdim, ngroups)
    check_fraction("norm_eps", norm_eps)
    return d_inner, ngroups


def check_attention(
    *,
    d_model: int,
    nheads: int,
    nheads_kv: int | None,
    headdim: int | None,
    d_conv: int,
    rotary_emb_dim: int,
    rotary_emb_base: float,
    rotary_emb_interleaved: bool,
    softmax_scale: float | None,
    window: int | None,
    qkv_proj_bias: bool,
    out_proj_bias: bool,
) -> tuple[int, int, float]:
    """Validates the options of `Attention`.

    **Returns:**

    `nheads_kv`, `headdim` and `softmax_scale`, with their defaults if they are `None`.
    """
    check_positive("d_model", d_model)
    check_positive("nheads", nheads)
    nheads_kv = nheads if nheads_kv is None else nheads_kv
    check_positive("nheads_kv", nheads_kv)
    if headdim is None:
        if d_model % nheads:
            raise ValueError(
                f"`nheads` must divide `d_model`, but got nheads={nheads} and d_model={d_model}. "
                "Choose another number of heads, or set `headdim`."
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
    check_positive_number("rotary_emb_base", rotary_emb_base)
    check_flag("rotary_emb_interleaved", rotary_emb_interleaved)
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    check_positive_number("softmax_scale", scale)
    if window is not None:
        check_positive("window", window)
    check_flag("qkv_proj_bias", qkv_proj_bias)
    check_flag("out_proj_bias", out_proj_bias)
    return nheads_kv, headdim, float(scale)


def check_parallel(
    name: str, widths: Sequence[int], scales: tuple[float, ...] | None
) -> tuple[float, ...]:
    """Validates the options of `Parallel`.

    **Arguments:**

    - `name`: the name of the argument with the layers or their configs.
    - `widths`: `d_model` of each of these.
    - `scales`: the scales, or `None`.

    **Returns:**

    `scales`, with its default if it is `None`.
    """
    if not widths:
        raise ValueError(f"`{name}` of `Parallel` must be one or more, but got none.")
    if len(set(widths)) > 1:
        raise ValueError(
            f"The `{name}` of `Parallel` must share `d_model`, but got d_model={list(widths)}."
        )
    scales = (1.0,) * len(widths) if scales is None else scales
    check_positive_numbers("scales", scales, len(widths), f"of the `{name}`")
    return tuple(map(float, scales))


def check_dt(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Validates the range of the initial step sizes."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(
            f"`dt_min` and `dt_max` must satisfy 0 < dt_min <= dt_max, but got dt_min={dt_min} and "
            f"dt_max={dt_max}."
        )
    if not 0 < dt_init_floor < math.inf:
        raise ValueError(
            f"`dt_init_floor` must be a positive number, but got dt_init_floor={dt_init_floor}."
        )


def check_A_init_range(A_init_range: tuple[float, float]) -> None:
    """Validates the range of the initial rates of decay."""
    low, high = A_init_range
    if not 0 < low <= high < math.inf:
        raise ValueError(
            "`A_init_range` must be two positive numbers in ascending order, but got "
            f"A_init_range={A_init_range}."
        )


def _check_heads(channels_name: str, channels: int, headdim: int, ngroups: int) -> None:
    check_positive("headdim", headdim)
    check_positive("ngroups", ngroups)
    if channels % headdim:
        default = "2 * d_model" if channels_name == "d_inner" else "d_inner"
        raise ValueError(
            f"`headdim` must divide `{channels_name}` ({default} by default), but got "
            f"headdim={headdim} and {channels_name}={channels}."
        )
    nheads = channels // headdim
    if nheads % ngroups:
        raise ValueError(
            f"`ngroups` must divide the number of heads, `{channels_name} / headdim`, but got "
            f"ngroups={ngroups} and {nheads} heads ({channels_name}={channels}, "
            f"headdim={headdim})."
        )


def _check_dt_limit(dt_limit: tuple[float, float]) -> None:
    if not (
        isinstance(dt_limit, tuple)
        and len(dt_limit) == 2
        and all(isinstance(v, float | int) and not isinstance(v, bool) for v in dt_limit)
    ):
        raise ValueError(
            f"`dt_limit` must be a tuple of two numbers, but got dt_limit={dt_limit!r}."
        )
    low, high = dt_limit
    if not (0 <= low <= high and high > 0 and low < math.inf):
        raise ValueError(
            "`dt_limit` must be the smallest and the largest step size, with 0 <= smallest <= "
            f"largest, but got dt_limit={dt_limit}. Use `(0.0, math.inf)` for no limit."
        )
