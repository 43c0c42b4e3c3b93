"""Hybrids of Mamba and attention as a plain loop over tokens, in float64."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tests.golden import _loop_mamba2
from tests.golden._witness import Tensors, rms_norm, silu


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of the parts of a model in a family of checkpoints."""

    embedding: str
    layer: str
    final: str
    mamba: str
    attention: str
    norm: str
    norm2: str


OFFICIAL = Names(
    embedding="backbone.embeddings.weight",
    layer="backbone.layers.{}.",
    final="backbone.norm_f.weight",
    mamba="mixer.",
    attention="mixer.",
    norm="norm.weight",
    norm2="norm2.weight",
)
TRANSFORMERS = Names(
    embedding="model.embed_tokens.weight",
    layer="model.layers.{}.",
    final="model.final_layernorm.weight",
    mamba="mamba.",
    attention="self_attn.",
    norm="input_layernorm.weight",
    norm2="pre_ff_layernorm.weight",
)
GRANITE = dataclasses.replace(
    TRANSFORMERS, final="model.norm.weight", norm2="post_attention_layernorm.weight"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The kind of each layer, `"1"`, `"2"` (Mamba), `"a"` (attention) or `"p"` (Mamba-2 and
    attention side by side), and the sizes of parts."""

    names: Names
    kinds: str
    eps: float
    d_inner: int
    d_state: int
    heads: tuple[int, int, int]  # of queries, of keys; features per head
    dt_rank: int = 0
    nheads: int = 0
    ngroups: int = 1
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    rotary: tuple[int, float, bool] = (0, 1.0, False)  # features, base, interleaved
    scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    ssm_multipliers: tuple[float, ...] = (1.0,) * 5
    mlp_multipliers: tuple[float, float] = (1.0, 1.0)  # of the gate and the output
    key_multiplier: float = 1.0
    mamba_in_out: tuple[float, float] = (1.0, 1.0)  # multipliers of input and output
    attention_in_out: tuple[float, float] = (1.0, 1.0)


def loop(weights: Tensors, tokens: torch.Tensor, sizes: Sizes) -> Tensors:
    """Runs a hybrid one token and one layer at a time."""
    s, n = sizes, sizes.names
    embedding = weights[n.embedding]
    memory: list[dict[str, Any]] = [{} for _ in s.kinds]
    stream: dict[str, list] = {f"hidden_states.{i}": [] for i in range(len(s.kinds))}
    stream |= {"hidden_states.norm_f": [], "logits": []}
    layers = [_within(weights, n.layer.format(i)) for i in range(len(s.kinds))]
    for token in tokens.tolist():
        h = s.embedding_multiplier * embedding[token]
        for i, kind in enumerate(s.kinds):
            w = layers[i]
            out = _mix(w, kind, rms_norm(h, w[n.norm], s.eps), memory[i], s)
            h = h + s.residual_multiplier * out
            h = h + s.residual_multiplier * _mlp(w, rms_norm(h, w[n.norm2], s.eps), s)
            stream[f"hidden_states.{i}"].append(h)
        h = rms_norm(h, weights[n.final], s.eps)
        stream["hidden_states.norm_f"].append(h)
        logits = weights.get("lm_head.weight", embedding) @ h
        stream["logits"].append(logits / s.logits_divisor)
    answer = {name: torch.stack(rows) for name, rows in stream.items()}
    for i, kind in enumerate(s.kinds):
        for name in {"a": ("k", "v"), "p": ("conv", "ssm", "k", "v")}.get(kind, ("conv", "ssm")):
            value = memory[i][name]
            # The heads come first, then the tokens of a cache.
            if kind != "1" and name != "conv":
                value = torch.stack(value, dim=0 if name == "ssm" else 1)
            answer[f"state.{i}.{name}"] = value
    return answer


def _mix(w: Tensors, kind: str, u: torch.Tensor, memory: dict[str, Any], s: Sizes) -> torch.Tensor:
    if kind == "p":
        (in_2, out_2), (in_a, out_a) = s.mamba_in_out, s.attention_in_out
        mixed = out_2 * _mix(w, "2", in_2 * u, memory, s)
        return mixed + out_a * _mix(w, "a", in_a * u, memory, s)
    run = {"1": _mamba1, "2": _mamba2, "a": _attention}[kind]
    return run(_within(w, s.names.attention if kind == "a" else s.names.mamba), u, memory, s)


def _within(weights: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _project(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)


def _conv(w: Tensors, x: torch.Tensor, memory: dict[str, Any]) -> torch.Tensor:
    taps = w["conv1d.weight"][:, 0]
    last = memory.get("conv", torch.zeros_like(taps))
    memory["conv"] = torch.cat([last[:, 1:], x[:, None]], dim=1)
    return (memory["conv"] * taps).sum(1) + w.get("conv1d.bias", 0)


def _mamba1(w: Tensors, u: torch.Tensor, memory: dict[str, Any], s: Sizes) -> torch.Tensor:
    x, z = _project(w, "in_proj", u).split(s.d_inner)
    x = silu(_conv(w, x, memory))
    dt, b, c = (w["x_proj.weight"] @ x).split([s.dt_rank, s.d_state, s.d_state])
    dt = rms_norm(dt, w["dt_layernorm.weight"], s.eps)
    b = rms_norm(b, w["b_layernorm.weight"], s.eps)
    c = rms_norm(c, w["c_layernorm.weight"], s.eps)
    dt = _project(w, "dt_proj", dt)
    dt = torch.logaddexp(dt, torch.zeros_like(dt))
    decay = torch.exp(-torch.exp(w["A_log"]) * dt[:, None])
    state = memory.get("ssm", torch.zeros_like(decay))
    memory["ssm"] = decay * state + (dt * x)[:, None] * b[None, :]
    y = (memory["ssm"] * c[None, :]).sum(1) + w["D"] * x
    return _project(w, "out_proj", y * silu(z))


def _mamba2(w: Tensors, u: torch.Tensor, memory: dict[str, Any], s: Sizes) -> torch.Tensor:
    of_groups, headdim = s.ngroups * s.d_state, s.d_inner // s.nheads
    parts = [s.d_inner, s.d_inner, of_groups, of_groups, s.nheads]
    row = _project(w, "in_proj", u).split(parts)
    row = torch.cat([m * part for m, part in zip(s.ssm_multipliers, row, strict=True)])
    z, xbc, dt = row.split([s.d_inner, s.d_inner + 2 * of_groups, s.nheads])
    x, b, c = silu(_conv(w, xbc, memory)).split([s.d_inner, of_groups, of_groups])
    dt = torch.logaddexp(dt + w["dt_bias"], torch.zeros_like(dt)).clamp(*s.dt_limit)
    empty = [torch.zeros(headdim, s.d_state, dtype=torch.float64)] * s.nheads
    states, y = [], []
    for k, state in enumerate(memory.get("ssm", empty)):
        group = slice((g := k * s.ngroups // s.nheads) * s.d_state, (g + 1) * s.d_state)
        x_k = x[k * headdim : (k + 1) * headdim]
        decay = torch.exp(-torch.exp(w["A_log"][k]) * dt[k])
        states.append(decay * state + dt[k] * x_k[:, None] * b[group][None, :])
        y.append((states[k] * c[group][None, :]).sum(1) + w["D"][k] * x_k)
    memory["ssm"] = states
    y = torch.cat(y) * silu(z)
    if "norm.weight" not in w:
        return _project(w, "out_proj", y)
    pairs = zip(
        y.split(s.d_inner // s.ngroups),
        w["norm.weight"].split(s.d_inner // s.ngroups),
        strict=True,
    )
    return _project(w, "out_proj", torch.cat([rms_norm(a, b, s.eps) for a, b in pairs]))


def _attention(w: Tensors, u: torch.Tensor, memory: dict[str, Any], s: Sizes) -> torch.Tensor:
    nheads, nheads_kv, headdim = s.heads
    if "in_proj.weight" in w:
        qkv = _project(w, "in_proj", u)
        out = "out_proj"
    else:
        qkv = torch.cat([_project(w, f"{part}_proj", u) for part in "qkv"])
        out = "o_proj"
    if "conv1d.weight" in w:
        qkv = _conv(w, qkv, memory)
    heads = qkv.reshape(-1, headdim)
    q, k, v = heads.split([nheads, nheads_kv, nheads_kv])
    k = s.key_multiplier * k
    at = len(memory.setdefault("k", []))
    memory["k"].append(_rotated(k, at, s))
    memory.setdefault("v", []).append(v)
    y = []
    for head, query in enumerate(_rotated(q, at, s)):
        of = head * nheads_kv // nheads
        scores = torch.stack([(query * key[of]).sum() for key in memory["k"]])
        scores = torch.exp(scores * (headdim**-0.5 if s.scale is None else s.scale))
        weighted = [p * value[of] for p, value in zip(scores, memory["v"], strict=True)]
        y.append(sum(weighted) / scores.sum())
    return _project(w, out, torch.cat(y))


def _rotated(x: torch.Tensor, at: int, s: Sizes) -> torch.Tensor:
    """Rotates every pair of features as a complex number."""
    dim, base, interleaved = s.rotary
    if dim == 0:
        return x
    first, rest = x[:, :dim], x[:, dim:]
    pairs = first.unflatten(1, (-1, 2)) if interleaved else first.unflatten(1, (2, -1)).mT
    angles = at * base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    cos, sin = torch.cos(angles), torch.sin(angles)
    a, b = pairs.unbind(-1)
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([(pairs if interleaved else pairs.mT).flatten(1), rest], dim=1)


def _mlp(w: Tensors, x: torch.Tensor, s: Sizes) -> torch.Tensor:
    if "mlp.fc1.weight" in w:
        up, gate = _project(w, "mlp.fc1", x).chunk(2)
        return _project(w, "mlp.fc2", up * silu(gate))
    if "shared_mlp.input_linear.weight" in w:
        gate, up = _project(w, "shared_mlp.input_linear", x).chunk(2)
        return _project(w, "shared_mlp.output_linear", up * silu(gate))
    up, gate = (_project(w, f"feed_forward.{part}_proj", x) for part in ("up", "gate"))
    of_gate, of_output = s.mlp_multipliers
    return of_output * _project(w, "feed_forward.down_proj", up * silu(of_gate * gate))


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    def normal(scale: float) -> np.ndarray:
        return scale * rng.standard_normal(shape)

    if name.endswith("norm.weight"):
        draw = rng.uniform(0.5, 1.6, shape)
    elif name.endswith("embed_tokens.weight"):
        draw = normal(0.7)
    elif name.endswith(("dt_bias", "dt_proj.bias")):
        draw = rng.uniform(-2.0, 1.0, shape)
    elif name.endswith(("q_proj.weight", "k_proj.weight")):
        draw = normal(1.8 / shape[-1] ** 0.5)
    elif (
        name.endswith(("v_proj.weight", "o_proj.weight", "fc1.weight", "fc2.weight"))
        or "feed_forward" in name
        or "shared_mlp" in name
    ):
        draw = normal(1.1 / shape[-1] ** 0.5)
    elif name.endswith("_proj.bias"):
        draw = normal(0.4)
    elif name.endswith(("norm2.weight", "norm_f.weight")):
        draw = rng.uniform(0.5, 1.6, shape)
    else:
        return _loop_mamba2.random_weight(rng, name, shape)
    return torch.from_numpy(draw.astype(np.float32))
