"""Makes the golden files of hybrids with attention, in the manner of `make_golden.py`.

python tests/golden/make_golden_hybrid.py [--out somewhere] [--case bamba_tiny]
python tests/golden/make_golden_hybrid.py --official SDIST    # that of the official code too
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
import torch.nn.functional as F
import transformers
from _loop_hybrid import TRANSFORMERS, Sizes, loop, random_weight
from _official_attention import make_official
from _witness import WEIGHTS, Tensors, greedy, honest_float64
from safetensors.numpy import load_file


# Sizes are odd and different from one another, so that no axis can stand in for another, and
# options that do not touch the result are off their defaults as well.
COMMON = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.07, "use_cache": False}
CASES: dict[str, dict[str, Any]] = {
    "bamba_tiny": {
        "seed": 6,
        "length": 15,
        "kinds": "2a2",
        "config": transformers.BambaConfig(
            vocab_size=23,
            hidden_size=10,
            intermediate_size=7,
            num_hidden_layers=3,
            attn_layer_indices=[1],
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=5,  # pyright: ignore[reportCallIssue]  (it reads it nevertheless)
            attention_bias=True,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.9,
            },
            mamba_n_heads=4,
            mamba_d_head=5,
            mamba_n_groups=2,
            mamba_d_state=3,
            mamba_d_conv=3,
            mamba_chunk_size=4,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            time_step_limit=(0.2, 0.9),
            rms_norm_eps=3e-4,
            tie_word_embeddings=True,
            pad_token_id=None,
            max_position_embeddings=99,
            num_logits_to_keep=3,
            z_loss_coefficient=0.1,
            **COMMON,
        ),
        "sizes": {
            "d_inner": 20,
            "d_state": 3,
            "heads": (6, 2, 5),
            "nheads": 4,
            "ngroups": 2,
            "dt_limit": (0.2, 0.9),
            "rotary": (4, 50.0, False),
        },
    },
    "jamba_tiny": {
        "seed": 1,
        "length": 13,
        "kinds": "1a1",
        "config": transformers.JambaConfig(
            vocab_size=23,
            hidden_size=9,
            intermediate_size=7,
            num_hidden_layers=3,
            attn_layer_period=3,
            attn_layer_offset=1,
            num_experts=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            mamba_expand=2,
            mamba_d_state=5,
            mamba_d_conv=3,
            mamba_dt_rank=4,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            rms_norm_eps=3e-4,
            tie_word_embeddings=False,
            pad_token_id=None,
            max_position_embeddings=99,
            expert_layer_offset=0,
            expert_layer_period=3,
            num_experts_per_tok=1,
            router_aux_loss_coef=0.1,
            **COMMON,
        ),
        "sizes": {"d_inner": 18, "d_state": 5, "heads": (3, 1, 3), "dt_rank": 4},
    },
}


def make(case: str, out: Path) -> None:
    for package in ("mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(package) is None, f"transformers would use {package}"
    spec = CASES[case]
    rng = np.random.default_rng(spec["seed"])
    model: Any = transformers.AutoModelForCausalLM.from_config(spec["config"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(rng, name, tuple(parameter.shape)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = type(model).from_pretrained(folder).eval()
        weights = {k: torch.from_numpy(v) for k, v in load_file(folder / WEIGHTS).items()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), f"{name} is not what the file holds"
        tokens = torch.from_numpy(rng.integers(model.config.vocab_size, size=spec["length"]))
        with torch.no_grad():
            logits_float32 = model(tokens[None], use_cache=False).logits[0]
        witness = _answers(model.double(), tokens, spec["kinds"])
        sizes: Any = Sizes(
            names=TRANSFORMERS,
            kinds=spec["kinds"],
            eps=model.config.rms_norm_eps,
            **spec["sizes"],
        )
        with mock.patch.object(_witness, "loop", loop):
            ours = _witness.loop_answers(weights, tokens, sizes)
        _witness.check(case, witness, ours)
        _witness.check_size_of_values(witness)
        rounding = (logits_float32 - witness["logits"]).abs().max() / witness["logits"].abs().max()
        print(f"  float32 logits are {rounding:.1e} off; greedy {witness['greedy'].tolist()}")
        _witness.save(folder, {"tokens": tokens, "logits_float32": logits_float32, **witness})
        _witness.publish(folder, out / case)


def _answers(model: Any, tokens: torch.Tensor, kinds: str) -> Tensors:
    if model.config.model_type == "bamba":
        # Made in float32 before the model was widened.
        rotary, c = model.model.rotary_emb, model.config
        with honest_float64():
            dim = int(c.head_dim * c.rope_parameters["partial_rotary_factor"])
            powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            rotary.inv_freq = c.rope_parameters["rope_theta"] ** -powers
    # `output_hidden_states` leaves out the stream after the last block.
    hidden = []
    for module in (*model.model.layers, model.model.final_layernorm):
        module.register_forward_hook(
            lambda module, args, out: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
    with honest_float64():
        out = model(tokens[None], use_cache=False)
        names = [*range(len(kinds)), "norm_f"]
        answer = {f"hidden_states.{n}": h[0] for n, h in zip(names, hidden, strict=True)}
        loss = F.cross_entropy(out.logits[0, :-1], tokens[1:])
        loss.backward()
        with torch.no_grad():
            cached = model(tokens[None], use_cache=True)
            chosen = greedy(lambda t: model(t[None], use_cache=False).logits[0], tokens)
    answer |= {"logits": out.logits[0], "loss": loss, "greedy": chosen}
    for i, (kind, layer) in enumerate(zip(kinds, cached.cache.layers, strict=True)):
        if kind == "a":
            answer |= {f"state.{i}.k": layer.keys[0], f"state.{i}.v": layer.values[0]}
        else:
            answer[f"state.{i}.conv"] = layer.conv_states[0][0]
            answer[f"state.{i}.ssm"] = layer.recurrent_states[0][0]
    answer |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach() for name, value in answer.items()}


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
        make(case, args.out)
    if args.official is not None:
        make_official(args.out, args.official)


if __name__ == "__main__":
    main()
