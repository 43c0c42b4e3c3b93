"""Mamba-1 and Falcon-Mamba as a plain loop over tokens, in float64."""

import dataclasses
from collections.abc import Callable

import torch

from tests.golden._witness import Tensors, rms_norm, silu


@dataclasses.dataclass(frozen=True)
class Sizes:
    n_layer: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    eps: float
    act: str
    select_eps: float | None = None  # eps of Falcon-Mamba's norms of dt, B and C


ACTIVATIONS: dict[str, Callable] = {
    "silu": silu,
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
}


def loop(weights: Tensors, tokens: torch.Tensor, sizes: Sizes) -> Tensors:
    """Runs Mamba-1 as its recurrence, one token and one layer at a time."""
    s = sizes
    conv = [torch.zeros(s.d_inner, s.d_conv, dtype=torch.float64) for _ in range(s.n_layer)]
    ssm = [torch.zeros(s.d_inner, s.d_state, dtype=torch.float64) for _ in range(s.n_layer)]
    embedding = weights["backbone.embeddings.weight"]
    head = weights.get("lm_head.weight", embedding)
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
            xz = w["mixer.in_proj.weight"] @ u + w.get("mixer.in_proj.bias", 0)
            x, z = xz[: s.d_inner], xz[s.d_inner :]
            conv[i] = torch.cat([conv[i][:, 1:], x[:, None]], dim=1)
            x = (conv[i] * w["mixer.conv1d.weight"][:, 0]).sum(1) + w.get("mixer.conv1d.bias", 0)
            x = ACTIVATIONS[s.act](x)
            dbc = w["mixer.x_proj.weight"] @ x
            dt, b, c = dbc.split([s.dt_rank, s.d_state, s.d_state])
            if s.select_eps is not None:
                dt, b, c = (rms_norm(part, 1, s.select_eps) for part in (dt, b, c))
            dt = w["mixer.dt_proj.weight"] @ dt + w["mixer.dt_proj.bias"]
            dt = torch.logaddexp(dt, torch.zeros_like(dt))
            decay = torch.exp(-torch.exp(w["mixer.A_log"]) * dt[:, None])
            ssm[i] = decay * ssm[i] + (dt * x)[:, None] * b[None, :]
            y = (ssm[i] * c[None, :]).sum(1) + w["mixer.D"] * x
            h = h + w["mixer.out_proj.weight"] @ (y * silu(z)) + w.get("mixer.out_proj.bias", 0)
            stream[f"hidden_states.{i}"].append(h)
        h = rms_norm(h, weights["backbone.norm_f.weight"], s.eps)
        stream["hidden_states.norm_f"].append(h)
        stream["logits"].append(head @ h)
    answer = {name: torch.stack(rows) for name, rows in stream.items()}
    for i in range(s.n_layer):
        answer |= {f"state.{i}.conv": conv[i], f"state.{i}.ssm": ssm[i]}
    return answer
