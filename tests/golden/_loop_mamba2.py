"""Mamba-2 as a plain loop over tokens, in float64."""

import dataclasses

import numpy as np
import torch

from tests.golden import _witness
from tests.golden._witness import Tensors, rms_norm, silu


@dataclasses.dataclass(frozen=True)
class Sizes:
    n_layer: int
    nheads: int
    headdim: int
    ngroups: int
    d_state: int
    d_conv: int
    dt_limit: tuple[float, float]
    eps: float
    d_mlp: int = 0
    norm_before_gate: bool = False


def loop(weights: Tensors, tokens: torch.Tensor, sizes: Sizes) -> Tensors:
    """Runs Mamba-2 as its recurrence, one token, one layer and one head at a time."""
    s = sizes
    d_inner, of_groups = s.nheads * s.headdim, s.ngroups * s.d_state
    channels = d_inner + 2 * of_groups
    conv = [torch.zeros(channels, s.d_conv, dtype=torch.float64) for _ in range(s.n_layer)]
    empty = torch.zeros(s.headdim, s.d_state, dtype=torch.float64)
    ssm = [[empty] * s.nheads for _ in range(s.n_layer)]
    embedding = weights["backbone.embeddings.weight"]
    stream: dict[str, list] = {f"hidden_states.{i}": [] for i in range(s.n_layer)}
    stream |= {"hidden_states.norm_f": [], "logits": []}
    for token in tokens.tolist():
        h = embedding[token]
        for i in range(s.n_layer):
            w = {
                name.removeprefix(f"backbone.layers.{i}."): value
                for name, value in weights.items()
                if name.startswith(f"backbone.layers.{i}.")
            }
            u = rms_norm(h, w["norm.weight"], s.eps)
            row = w["mixer.in_proj.weight"] @ u + w.get("mixer.in_proj.bias", 0)
            z0, x0, z, xbc, dt = row.split([s.d_mlp, s.d_mlp, d_inner, channels, s.nheads])
            conv[i] = torch.cat([conv[i][:, 1:], xbc[:, None]], dim=1)
            xbc = (conv[i] * w["mixer.conv1d.weight"][:, 0]).sum(1) + w.get("mixer.conv1d.bias", 0)
            xbc = silu(xbc)
            b_all, c_all = xbc[d_inner : d_inner + of_groups], xbc[d_inner + of_groups :]
            dt = torch.logaddexp(dt + w["mixer.dt_bias"], torch.zeros_like(dt))
            dt = torch.minimum(
                torch.maximum(dt, torch.full_like(dt, s.dt_limit[0])),
                torch.full_like(dt, s.dt_limit[1]),
            )
            skip = w["mixer.D"].reshape(s.nheads, -1)  # per head, or per channel
            y = []
            for k in range(s.nheads):
                group = k * s.ngroups // s.nheads
                b = b_all[group * s.d_state : (group + 1) * s.d_state]
                c = c_all[group * s.d_state : (group + 1) * s.d_state]
                x = xbc[k * s.headdim : (k + 1) * s.headdim]
                decay = torch.exp(-torch.exp(w["mixer.A_log"][k]) * dt[k])
                ssm[i][k] = decay * ssm[i][k] + dt[k] * x[:, None] * b[None, :]
                y.append((ssm[i][k] * c[None, :]).sum(1) + skip[k] * x)
            gated = torch.cat(y) * (1 if s.norm_before_gate else silu(z))
            width = d_inner // s.ngroups
            gated = torch.cat(
                [
                    rms_norm(part, weight, s.eps)
                    for part, weight in zip(
                        gated.split(width), w["mixer.norm.weight"].split(width), strict=True
                    )
                ]
            )
            if s.norm_before_gate:
                gated = gated * silu(z)
            gated = torch.cat([silu(z0) * x0, gated])
            h = h + w["mixer.out_proj.weight"] @ gated + w.get("mixer.out_proj.bias", 0)
            stream[f"hidden_states.{i}"].append(h)
        h = rms_norm(h, weights["backbone.norm_f.weight"], s.eps)
        stream["hidden_states.norm_f"].append(h)
        stream["logits"].append(weights.get("lm_head.weight", embedding) @ h)
    answer = {name: torch.stack(rows) for name, rows in stream.items()}
    for i in range(s.n_layer):
        answer |= {f"state.{i}.conv": conv[i], f"state.{i}.ssm": torch.stack(ssm[i])}
    return answer


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("dt_bias"):
        return torch.from_numpy(rng.uniform(-2.0, 1.0, shape).astype(np.float32))
    return _witness.random_weight(rng, name, shape)
