"""Makes the golden files of Mamba-2, in the manner of `make_golden.py` and with its machinery.

python tests/golden/make_golden_mamba2.py [--out somewhere]
python tests/golden/make_golden_mamba2.py --official SDIST    # those of the official code too
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import _witness
import numpy as np
import torch
import transformers
from _loop_mamba2 import Sizes, loop, random_weight
from _official_mamba2 import OFFICIAL_CASES
from _witness import WEIGHTS
from make_golden import transformers_answers
from safetensors.numpy import load_file


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
    parser.add_argument("--official", type=Path, help="an unpacked source archive of mamba-ssm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    make(args.out)
    for case, make_case in OFFICIAL_CASES.items():
        if args.official is None:
            print(f"{case}: left out, it needs --official")
        else:
            make_case(case, args.out, args.official)


if __name__ == "__main__":
    main()
