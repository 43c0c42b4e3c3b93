"""Makes the golden files of Mamba-2, in the manner of `make_golden.py` and with its machinery.

python tests/golden/make_golden_mamba2.py [--out somewhere]
"""

import argparse
import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import _witness
import numpy as np
import torch
import transformers
from _witness import WEIGHTS, Tensors, rms_norm, silu
from make_golden import transformers_answers
from safetensors.numpy import load_file


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


def loop(weights: Tensors, tokens: torch.Tensor, sizes: Sizes) -> Tensors:
    """One token, one layer and one head at a time: Mamba-2 as its recurrence."""
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
            z, xbc, dt = row[:d_inner], row[d_inner : d_inner + channels], row[d_inner + channels :]
            conv[i] = torch.cat([conv[i][:, 1:], xbc[:, None]], dim=1)
            xbc = (conv[i] * w["mixer.conv1d.weight"][:, 0]).sum(1) + w.get("mixer.conv1d.bias", 0)
            xbc = silu(xbc)
            b_all, c_all = xbc[d_inner : d_inner + of_groups], xbc[d_inner + of_groups :]
            dt = torch.logaddexp(dt + w["mixer.dt_bias"], torch.zeros_like(dt))
            dt = torch.minimum(
                torch.maximum(dt, torch.full_like(dt, s.dt_limit[0])),
                torch.full_like(dt, s.dt_limit[1]),
            )
            y = []
            for k in range(s.nheads):
                group = k * s.ngroups // s.nheads
                b = b_all[group * s.d_state : (group + 1) * s.d_state]
                c = c_all[group * s.d_state : (group + 1) * s.d_state]
                x = xbc[k * s.headdim : (k + 1) * s.headdim]
                decay = torch.exp(-torch.exp(w["mixer.A_log"][k]) * dt[k])
                ssm[i][k] = decay * ssm[i][k] + dt[k] * x[:, None] * b[None, :]
                y.append((ssm[i][k] * c[None, :]).sum(1) + w["mixer.D"][k] * x)
            gated = torch.cat(y) * silu(z)
            width = d_inner // s.ngroups
            gated = torch.cat(
                [
                    rms_norm(part, weight, s.eps)
                    for part, weight in zip(
                        gated.split(width), w["mixer.norm.weight"].split(width), strict=True
                    )
                ]
            )
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


# Sizes are odd and different from one another, so that no axis can stand in for another. Half of
# the step sizes lie outside of the limit, and 17 tokens are several of transformers' chunks.
CASE, SEED, LENGTH = "mamba2_tiny", 3, 17
CONFIG = {
    "vocab_size": 37,
    "hidden_size": 18,
    "expand": 3,
    "num_heads": 6,
    "head_dim": 9,
    "n_groups": 3,
    "state_size": 5,
    "conv_kernel": 3,
    "chunk_size": 7,
    "num_hidden_layers": 2,
    "use_bias": True,
    "use_conv_bias": True,
    "layer_norm_epsilon": 3e-4,
    "residual_in_fp32": True,
    "tie_word_embeddings": False,
    "time_step_limit": [0.2, 0.9],
    # Options that do not touch the result are off their defaults too.
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.07,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_floor": 2e-4,
    "time_step_rank": 5,
    "use_cache": False,
}


def make(out: Path) -> None:
    for package in ("mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(package) is None, f"transformers would use {package}"
    rng = np.random.default_rng(SEED)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(rng, name, tuple(parameter.shape)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = transformers.Mamba2ForCausalLM.from_pretrained(folder).eval()
        config = model.config
        weights = {k: torch.from_numpy(v) for k, v in load_file(folder / WEIGHTS).items()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), f"{name} is not what the file holds"
        tokens = torch.from_numpy(rng.integers(config.vocab_size, size=LENGTH))
        with torch.no_grad():
            logits_float32 = model(tokens[None], use_cache=False).logits[0]
        assert logits_float32.dtype == torch.float32

        witness = transformers_answers(model.double(), tokens)
        sizes: Any = Sizes(
            n_layer=config.num_hidden_layers,
            nheads=config.num_heads,
            headdim=config.head_dim,
            ngroups=config.n_groups,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            dt_limit=(config.time_step_limit[0], config.time_step_limit[1]),
            eps=config.layer_norm_epsilon,
        )
        with mock.patch.object(_witness, "loop", loop):
            ours = _witness.loop_answers(weights, tokens, sizes)
        _witness.check(CASE, witness, ours)
        _witness.check_size_of_values(witness)
        rounding = (logits_float32 - witness["logits"]).abs().max() / witness["logits"].abs().max()
        print(f"  float32 logits are {rounding:.1e} off; greedy {witness['greedy'].tolist()}")
        _witness.save(folder, {"tokens": tokens, "logits_float32": logits_float32, **witness})
        _witness.publish(folder, out / CASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    make(args.out)


if __name__ == "__main__":
    main()
