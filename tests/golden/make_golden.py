"""Makes this folder's golden files: what transformers and the official code say, in float64.

    python tests/golden/make_golden.py                        # every case but the official scan
    python tests/golden/make_golden.py --official SDIST       # those too, and more checks
    python tests/golden/make_golden.py --case mamba_tiny --out somewhere

Nothing of `mamba_eqx` is imported here. Each case is computed twice, by the witness and by a plain
loop over tokens (`_witness.py`), and is written only if the two agree to `TOLERANCE`.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _official import SCAN_CASES, make_scan, make_state_spaces
from _witness import (
    WEIGHTS,
    Sizes,
    Tensors,
    check,
    check_size_of_values,
    greedy,
    honest_float64,
    loop_answers,
    publish,
    random_weight,
    save,
)
from safetensors.numpy import load_file


# --- transformers -------------------------------------------------------------------------------

# Sizes are odd and different from one another, so that no axis can stand in for another. Options
# that do not touch the result are off their defaults as well, since a reader must accept them; not
# `rescale_prenorm_residual`, with which transformers 5.24 rescales `out_proj` whenever it loads.
NOT_THE_DEFAULT = {
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.07,
    "time_step_scale": 1.5,
    "time_step_min": 0.002,
    "time_step_max": 0.2,
    "time_step_floor": 2e-4,
    "time_step_init_scheme": "constant",
    "use_associative_scan": False,
    "use_cache": False,
}

# Each a `Mamba` unless it says `model`.
TRANSFORMERS_CASES: dict[str, dict[str, Any]] = {
    # `intermediate_size` contradicts `expand`, and wins
    "mamba_tiny": {
        "seed": 2,
        "length": 13,
        "config": {
            "vocab_size": 37,
            "hidden_size": 19,
            "intermediate_size": 45,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "use_bias": True,
            "use_conv_bias": True,
            "layer_norm_epsilon": 3e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
        },
    },
    # rank "auto" is ceil(17 / 16) = 2; transformers resolves it before it writes the config
    "mamba_tied": {
        "seed": 7,
        "length": 11,
        "config": {
            "vocab_size": 41,
            "hidden_size": 17,
            "expand": 3,
            "intermediate_size": 23,
            "state_size": 7,
            "conv_kernel": 5,
            "time_step_rank": "auto",
            "num_hidden_layers": 3,
            "use_bias": False,
            "use_conv_bias": False,
            "layer_norm_epsilon": 2e-3,
            "residual_in_fp32": False,
            "tie_word_embeddings": True,
        },
    },
    # the exact gelu (erf), on the convolution only: the gate stays a silu
    "mamba_act": {
        "seed": 1,
        "length": 17,
        "config": {
            "vocab_size": 29,
            "hidden_size": 11,
            "expand": 3,
            "state_size": 3,
            "conv_kernel": 5,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": 7e-4,
            "residual_in_fp32": True,
            "tie_word_embeddings": False,
        },
    },
    # `expand` far from `intermediate_size`, as in the published config
    "falcon_tiny": {
        "model": "FalconMamba",
        "seed": 4,
        "length": 13,
        "config": {
            "vocab_size": 31,
            "hidden_size": 15,
            "expand": 16,
            "intermediate_size": 29,
            "state_size": 5,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "num_hidden_layers": 2,
            "use_bias": True,
            "use_conv_bias": False,
            "layer_norm_epsilon": 3e-4,
            "mixer_rms_eps": 0.2,
            "residual_in_fp32": False,
            "tie_word_embeddings": False,
        },
    },
}


def make_transformers(case: str, out: Path, sdist: Path | None) -> None:
    del sdist
    for package in ("mamba_ssm", "causal_conv1d", "mambapy"):
        assert importlib.util.find_spec(package) is None, f"transformers would use {package}"
    spec = TRANSFORMERS_CASES[case]
    family = spec.get("model", "Mamba")
    of_causal_lm = getattr(transformers, f"{family}ForCausalLM")
    rng = np.random.default_rng(spec["seed"])
    config = getattr(transformers, f"{family}Config")(**NOT_THE_DEFAULT, **spec["config"])
    model = of_causal_lm(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(rng, name, tuple(parameter.shape)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = of_causal_lm.from_pretrained(folder).eval()
        config = model.config
        weights = {k: torch.from_numpy(v) for k, v in load_file(folder / WEIGHTS).items()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), f"{name} is not what the file holds"
        tokens = torch.from_numpy(rng.integers(config.vocab_size, size=spec["length"]))
        with torch.no_grad():
            logits_float32 = model(tokens[None], use_cache=False).logits[0]
        assert logits_float32.dtype == torch.float32

        witness = transformers_answers(model.double(), tokens)
        sizes = Sizes(
            n_layer=config.num_hidden_layers,
            d_inner=config.intermediate_size,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            dt_rank=int(config.time_step_rank),
            eps=config.layer_norm_epsilon,
            act=config.hidden_act,
            select_eps=config.mixer_rms_eps if family == "FalconMamba" else None,
        )
        check(case, witness, loop_answers(weights, tokens, sizes))
        check_size_of_values(witness)
        rounding = (logits_float32 - witness["logits"]).abs().max() / witness["logits"].abs().max()
        print(f"  float32 logits are {rounding:.1e} off; greedy {witness['greedy'].tolist()}")
        save(folder, {"tokens": tokens, "logits_float32": logits_float32, **witness})
        publish(folder, out / case)


def transformers_answers(model: Any, tokens: torch.Tensor) -> Tensors:
    with honest_float64():
        out = model(tokens[None], use_cache=False, output_hidden_states=True)
        loss = F.cross_entropy(out.logits[0, :-1], tokens[1:])
        loss.backward()
        with torch.no_grad():
            cached = model(tokens[None], use_cache=True)
            chosen = greedy(lambda t: model(t[None], use_cache=False).logits[0], tokens)
    assert torch.equal(out.logits, cached.logits)

    # transformers gives the stream after each block, then after the final norm: our definition, and
    # `loop` holds it to that
    n_layer = model.config.num_hidden_layers
    names = [*range(n_layer), "norm_f"]
    answer = {
        f"hidden_states.{name}": hidden[0]
        for name, hidden in zip(names, out.hidden_states, strict=True)
    }
    answer |= {"logits": out.logits[0], "loss": loss, "greedy": chosen}
    for i, layer in enumerate(cached.cache.layers):
        answer[f"state.{i}.conv"] = layer.conv_states[0][0]
        answer[f"state.{i}.ssm"] = layer.recurrent_states[0][0]
    answer |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in answer.items()}


# --- all of them --------------------------------------------------------------------------------

CASES: dict[str, Callable[[str, Path, Path | None], None]] = {
    **dict.fromkeys(TRANSFORMERS_CASES, make_transformers),
    **dict.fromkeys(SCAN_CASES, make_scan),
    "state_spaces_mamba": make_state_spaces,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--case", choices=CASES, action="append", help="default: every case")
    parser.add_argument("--official", type=Path, help="an unpacked source archive of mamba-ssm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for case in args.case or CASES:
        CASES[case](case, args.out, args.official)


if __name__ == "__main__":
    main()
