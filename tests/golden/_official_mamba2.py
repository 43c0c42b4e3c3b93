"""Cases of the official code for Mamba-2: its language model, and its ssd."""

import importlib
import math
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.golden._loop_mamba2 import Sizes, loop, random_weight
from tests.golden._official import import_official, publish_official
from tests.golden._witness import (
    Tensors,
    check,
    check_size_of_values,
    honest_float64,
    loop_answers,
    publish,
    save,
)


def import_official_mamba2(sdist: Path) -> types.SimpleNamespace:
    """Imports the official modules, with their kernels replaced by their own references."""
    import_official(sdist)
    triton: Any = sys.modules["triton"]
    triton.__version__ = "3.0.0"
    config = types.SimpleNamespace(kwargs={"BLOCK_SIZE_N": 64})  # the smallest is looked up
    triton.autotune.return_value.return_value.configs = [config]
    if not isinstance(sys.modules.get("mamba_ssm.modules.mamba2"), types.ModuleType):
        sys.modules.pop("mamba_ssm.modules.mamba2")
    state: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_chunk_state")
    passing: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_state_passing")
    combined: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    gated: Any = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    minimal: Any = importlib.import_module("mamba_ssm.modules.ssd_minimal")
    mamba2: Any = importlib.import_module("mamba_ssm.modules.mamba2")

    def norm(self, x, z=None):
        return gated.rms_norm_ref(
            x,
            self.weight,
            self.bias,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def chunk_scan(x, dt, A, B, C, *, chunk_size, D, z=None):
        """Pads the sequence for the reference, which takes whole chunks; dt = 0 changes nothing."""
        seq = x.shape[1]
        x, dt, B, C = (
            F.pad(t, (0, 0) * (t.dim() - 2) + (0, -seq % chunk_size)) for t in (x, dt, B, C)
        )
        assert z is None
        y = combined.ssd_chunk_scan_combined_ref(x, dt, A, B, C, chunk_size, D=D)
        by_chunk = dt.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2)
        decay = torch.cumsum(by_chunk * A[:, None, None], dim=-1)
        states = state.chunk_state_ref(B, x, by_chunk, decay)
        _, last = passing.state_passing_ref(states.flatten(3), decay[..., -1])
        return y[:, :seq], last.unflatten(2, states.shape[3:])

    def kernel(
        x,
        dt,
        A,
        B,
        C,
        *,
        dt_bias,
        dt_softplus,
        seq_idx,
        cu_seqlens,
        return_final_states,
        return_varlen_states,
        dt_limit=(0.0, math.inf),
        **options,
    ):
        assert (dt_softplus, seq_idx, cu_seqlens, return_varlen_states) == (True, None, None, False)
        dt = F.softplus(dt + dt_bias).clamp(*dt_limit)
        y, last = chunk_scan(x, dt, A, B, C, **options)
        return (y, last) if return_final_states else y

    gated.RMSNorm.forward = norm
    mamba2.mamba_chunk_scan_combined = kernel
    model: Any = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    model.Mamba2 = mamba2.Mamba2
    return types.SimpleNamespace(ssd_minimal=minimal.ssd_minimal_discrete, chunk_scan=chunk_scan)


# All options that transformers lacks: some channels belong to an MLP, the skip is per channel, the
# norm comes before the gate, and the limit of the step sizes clips some of them.
SEED = 22
MODEL_CONFIG = {
    "d_model": 13,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 45,  # 48 rows, the padding included
    "ssm_cfg": {
        "layer": "Mamba2",
        "d_state": 5,
        "d_conv": 3,
        "expand": 3,
        "headdim": 4,
        "d_ssm": 24,
        "ngroups": 3,
        "D_has_hdim": True,
        "norm_before_gate": True,
        "dt_limit": [0.2, 0.9],
        "bias": True,
        "conv_bias": True,
        "chunk_size": 4,
        "use_mem_eff_path": False,
    },
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": False,
}


def make_model(case: str, out: Path, sdist: Path | None) -> None:
    """Makes a checkpoint of the official layout from the plain loop and the official model."""
    assert sdist is not None
    config, ssm = MODEL_CONFIG, MODEL_CONFIG["ssm_cfg"]
    d_model, d_ssm = config["d_model"], ssm["d_ssm"]
    d_inner, nheads = ssm["expand"] * d_model, d_ssm // ssm["headdim"]
    channels = d_ssm + 2 * ssm["ngroups"] * ssm["d_state"]
    d_mlp = d_inner - d_ssm
    rows = 2 * d_mlp + d_ssm + channels + nheads
    padded = -config["vocab_size"] % config["pad_vocab_size_multiple"] + config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (padded, d_model)}
    for i in range(config["n_layer"]):
        mixer: dict[str, tuple[int, ...]] = {
            "dt_bias": (nheads,),
            "A_log": (nheads,),
            "D": (d_ssm,),
            "in_proj.weight": (rows, d_model),
            "in_proj.bias": (rows,),
            "conv1d.weight": (channels, 1, ssm["d_conv"]),
            "conv1d.bias": (channels,),
            "norm.weight": (d_ssm,),
            "out_proj.weight": (d_model, d_inner),
            "out_proj.bias": (d_model,),
        }
        shapes[f"backbone.layers.{i}.norm.weight"] = (d_model,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["backbone.norm_f.weight"] = (d_model,)
    shapes["lm_head.weight"] = (padded, d_model)

    rng = np.random.default_rng(SEED)
    weights = {name: random_weight(rng, name, shape) for name, shape in shapes.items()}
    tokens = torch.from_numpy(rng.integers(config["vocab_size"], size=15))
    sizes = Sizes(
        n_layer=config["n_layer"],
        nheads=nheads,
        headdim=ssm["headdim"],
        ngroups=ssm["ngroups"],
        d_state=ssm["d_state"],
        d_conv=ssm["d_conv"],
        dt_limit=ssm["dt_limit"],
        eps=1e-5,
        d_mlp=d_mlp,
        norm_before_gate=ssm["norm_before_gate"],
    )
    answer = loop_answers(loop, weights, tokens, sizes)
    check_size_of_values(answer)
    import_official_mamba2(sdist)
    publish_official(case, config, weights, tokens, answer, out, sdist)


def make_ssd(case: str, out: Path, sdist: Path | None) -> None:
    """Makes `ssd_minimal_discrete` (listing 1 of the paper), from a state that is not zero."""
    assert sdist is not None
    official = import_official_mamba2(sdist)
    seq, chunk, ngroups, nheads, headdim, d_state = 12, 4, 2, 6, 3, 5
    rng = np.random.default_rng(8)
    inputs = {
        "x": rng.standard_normal((seq, nheads, headdim)),
        "dt": np.logaddexp(0, rng.uniform(-3, 2, (seq, nheads))),
        "A": -np.exp(rng.uniform(-1.5, 1.2, nheads)),
        "B": rng.standard_normal((seq, ngroups, d_state)),
        "C": rng.standard_normal((seq, ngroups, d_state)),
        "state": rng.standard_normal((d_state, nheads, headdim)),
    }
    weight = {
        "y": torch.from_numpy(rng.standard_normal((seq, nheads, headdim))),
        "end": torch.from_numpy(rng.standard_normal((d_state, nheads, headdim))),
    }

    def with_gradients(ssd: Callable[..., Any], **changes: Any) -> Tensors:
        leaves = {
            k: torch.from_numpy(v).clone().requires_grad_() for k, v in (inputs | changes).items()
        }
        y, end = ssd(**leaves)
        objective = (weight["y"] * y).sum() + (weight["end"] * end).sum()
        gradients = torch.autograd.grad(objective, list(leaves.values()), materialize_grads=True)
        answer = {"y": y, "end": end, "objective": objective}
        answer |= {f"grad.{k}": g for k, g in zip(leaves, gradients, strict=True)}
        return {k: v.detach().contiguous() for k, v in answer.items()}

    def minimal(x, dt, A, B, C, state):
        B, C = (t.repeat_interleave(nheads // ngroups, dim=1)[None] for t in (B, C))
        y, end = official.ssd_minimal(
            (x * dt[..., None])[None],
            (A * dt)[None],
            B,
            C,
            chunk,
            initial_states=state.permute(1, 2, 0)[None, None],
        )
        return y[0], end[0].permute(2, 0, 1)

    def chunk_scan(x, dt, A, B, C, state):
        del state
        y, end = official.chunk_scan(
            x[None], dt[None], A, B[None], C[None], chunk_size=chunk, D=None
        )
        return y[0], end[0].permute(2, 0, 1)

    def plain(x, dt, A, B, C, state):
        h, ys = state, []
        for t in range(seq):
            heads = []
            for i in range(nheads):
                group = i * ngroups // nheads
                h_i = torch.exp(dt[t, i] * A[i]) * h[:, i]
                heads.append(h_i + dt[t, i] * B[t, group][:, None] * x[t, i][None, :])
            h = torch.stack(heads, dim=1)
            c = torch.stack([C[t, i * ngroups // nheads] for i in range(nheads)], dim=1)
            ys.append((h * c[..., None]).sum(0))
        return torch.stack(ys), h

    with honest_float64():
        witness = with_gradients(minimal)
    check(case, witness, with_gradients(plain))
    print("  and against the references of the kernels, from an empty state:")
    empty = {"state": np.zeros_like(inputs["state"])}
    with honest_float64():
        theirs, ours = with_gradients(chunk_scan, **empty), with_gradients(minimal, **empty)
    del theirs["grad.state"], ours["grad.state"]
    check(f"  {case}", theirs, ours)
    arrays = {k: torch.from_numpy(v) for k, v in inputs.items()}
    arrays |= {f"weight.{k}": v for k, v in weight.items()} | witness
    with tempfile.TemporaryDirectory() as temporary:
        save(Path(temporary), arrays)
        publish(Path(temporary), out / case)
