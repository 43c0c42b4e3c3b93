"""Mamba-3 as a plain loop over tokens, in float64."""

from typing import Any

import torch

from tests.golden._witness import Tensors, rms_norm, silu


def heavy_tail(a: torch.Tensor) -> torch.Tensor:
    """Computes the activation of `dd_A` in the official repository since its pull request 962."""
    return torch.where(a >= 0, 1 + a, 1 / (1 - torch.clamp(a, max=0)))


def loop(weights: Tensors, tokens: torch.Tensor, cfg: Any) -> Tensors:
    """Runs Mamba-3 as its recurrence, one token, one layer and one head at a time.

    Rotated pairs of dimensions are complex numbers here.
    """
    mimo, ranks = cfg.get("is_mimo", False), range(cfg.get("mimo_rank", 1))
    n, p, groups = cfg["d_state"], cfg["headdim"], cfg.get("ngroups", 1)
    turned = int(n * cfg.get("rope_fraction", 0.5)) // 2
    embedding = weights["backbone.embeddings.weight"]
    d_inner = cfg["expand"] * embedding.shape[1]
    heads = range(d_inner // p)
    sizes = [d_inner, d_inner, *[len(ranks) * groups * n] * 2, *[len(heads)] * 3, turned]
    first = [i if mimo else 2 * i for i in range(turned)]
    second = [i + n // 2 if mimo else 2 * i + 1 for i in range(turned)]

    def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(x[first], x[second]) * torch.exp(1j * angle)
        x = x.clone()
        x[first], x[second] = pairs.real, pairs.imag
        return x

    layers = range(len([name for name in weights if name.endswith("in_proj.weight")]))
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64)
    angle = [[zeros(turned) for _ in heads] for _ in layers]
    ssm = [[zeros(p, n) for _ in heads] for _ in layers]
    k = [[[zeros(n) for _ in heads] for _ in ranks] for _ in layers]
    v = [[zeros(p) for _ in heads] for _ in layers]
    stream: dict[str, list] = {f"hidden_states.{i}": [] for i in layers}
    stream |= {"hidden_states.norm_f": [], "logits": []}
    for token in tokens.tolist():
        h = embedding[token]
        for i in layers:
            prefix = f"backbone.layers.{i}."
            w = {m.removeprefix(prefix): x for m, x in weights.items() if m.startswith(prefix)}
            u = w["mixer.in_proj.weight"] @ rms_norm(h, w["norm.weight"], 1e-5)
            z, x, b_all, c_all, dt, a, trap, rates = u.split(sizes)
            ones, out = torch.ones(p, dtype=torch.float64), []
            for j in heads:
                d = torch.logaddexp(dt[j] + w["mixer.dt_bias"][j], zeros(()))
                soft = cfg.get("A_activation") == "softplus"
                decay = torch.logaddexp(a[j], zeros(())) if soft else heavy_tail(a[j])
                alpha = torch.exp(-d * torch.clamp(decay, min=cfg.get("A_floor", 1e-4)))
                lam = 1 / (1 + torch.exp(-trap[j]))
                angle[i][j] = angle[i][j] + torch.pi * torch.tanh(rates) * d
                x_j, z_j, total = x[j * p : j * p + p], z[j * p : j * p + p], zeros(p)
                ssm[i][j] = alpha * ssm[i][j]
                q, k_new = [], []
                for r in ranks:
                    up = w["mixer.mimo_x"][j, r] if mimo else ones
                    ssm[i][j] = ssm[i][j] + (1 - lam) * d * alpha * torch.outer(
                        v[i][j] * up, k[i][r][j]
                    )
                    at = (r * groups + j * groups // len(heads)) * n
                    b = rms_norm(b_all[at : at + n], w["mixer.B_norm.weight"], 1e-5)
                    c = rms_norm(c_all[at : at + n], w["mixer.C_norm.weight"], 1e-5)
                    k_new.append(turn(b + w["mixer.B_bias"][j, r], angle[i][j]))
                    q.append(turn(c + w["mixer.C_bias"][j, r], angle[i][j]))
                    ssm[i][j] = ssm[i][j] + lam * d * torch.outer(x_j * up, k_new[r])
                for r in ranks:
                    up = w["mixer.mimo_x"][j, r] if mimo else ones
                    y = ssm[i][j] @ q[r] + w["mixer.D"][j] * x_j * up
                    if cfg.get("is_outproj_norm", False):
                        y = rms_norm(y, w["mixer.norm.weight"][j * p : j * p + p], 1e-5)
                    y = y * silu(z_j * w["mixer.mimo_z"][j, r] if mimo else z_j)
                    total = total + (y * w["mixer.mimo_o"][j, r] if mimo else y)
                    k[i][r][j] = k_new[r]
                v[i][j] = x_j
                out.append(total)
            h = h + w["mixer.out_proj.weight"] @ torch.cat(out)
            stream[f"hidden_states.{i}"].append(h)
        h = rms_norm(h, weights["backbone.norm_f.weight"], 1e-5)
        stream["hidden_states.norm_f"].append(h)
        stream["logits"].append(embedding @ h)
    answer = {name: torch.stack(rows) for name, rows in stream.items()}
    for i in layers:
        answer |= {f"state.{i}.angle": torch.stack(angle[i]), f"state.{i}.v": torch.stack(v[i])}
        answer[f"state.{i}.ssm"] = torch.stack(ssm[i])
        answer[f"state.{i}.k"] = torch.stack([torch.stack(of_rank) for of_rank in k[i]])
    return answer
