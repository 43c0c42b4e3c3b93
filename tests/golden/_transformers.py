"""Cases whose witness is transformers."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import load_file

from tests.golden import _loop_hybrid, _loop_mamba1, _loop_mamba2, _witness
from tests.golden._witness import (
    WEIGHTS,
    Tensors,
    check,
    check_size_of_values,
    greedy,
    honest_float64,
    loop_answers,
    publish,
    save,
)


class Kind(NamedTuple):
    """How the models of one architecture are made, and what they are compared with."""

    model: str
    """The name of the model class in transformers, without `ForCausalLM`."""
    random_weight: Callable[[np.random.Generator, str, tuple[int, ...]], torch.Tensor]
    loop: Callable[[Tensors, torch.Tensor, Any], Tensors]
    sizes: Callable[[Any], Any]
    """Reads the sizes for `loop` from transformers' config."""
    answers: Callable[[Any, torch.Tensor], Tensors]


class TransformersCase(NamedTuple):
    """A model with random weights, and the length of the sequence that it runs."""

    kind: Kind
    seed: int
    length: int
    config: dict[str, Any]


# --- how models run ------------------------------------------------------------------------------


def mamba_answers(model: Any, tokens: torch.Tensor) -> Tensors:
    """Runs a model without attention in float64."""
    with honest_float64():
        out = model(tokens[None], use_cache=False, output_hidden_states=True)
        loss = F.cross_entropy(out.logits[0, :-1], tokens[1:])
        loss.backward()
        with torch.no_grad():
            cached = model(tokens[None], use_cache=True)
            chosen = greedy(lambda t: model(t[None], use_cache=False).logits[0], tokens)
    assert torch.equal(out.logits, cached.logits)

    # transformers returns the stream after each block, then after the final norm. The comparison
    # with the loop checks that.
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


def hybrid_answers(model: Any, tokens: torch.Tensor, kinds: str) -> Tensors:
    """Runs a hybrid of Mamba and attention in float64."""
    if model.config.model_type == "bamba":
        # The frequencies were computed in float32 before the model was cast to float64.
        rotary, c = model.model.rotary_emb, model.config
        with honest_float64():
            dim = int(c.head_dim * c.rope_parameters["partial_rotary_factor"])
            powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            rotary.inv_freq = c.rope_parameters["rope_theta"] ** -powers
    # `output_hidden_states` would leave out the stream after the last block.
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


# --- architectures -------------------------------------------------------------------------------


def mamba1_sizes(config: Any) -> _loop_mamba1.Sizes:
    """Reads the sizes of a Mamba or Falcon-Mamba config."""
    return _loop_mamba1.Sizes(
        n_layer=config.num_hidden_layers,
        d_inner=config.intermediate_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        dt_rank=int(config.time_step_rank),
        eps=config.layer_norm_epsilon,
        act=config.hidden_act,
        select_eps=config.mixer_rms_eps if config.model_type == "falcon_mamba" else None,
    )


def mamba2_sizes(config: Any) -> _loop_mamba2.Sizes:
    """Reads the sizes of a Mamba-2 config."""
    return _loop_mamba2.Sizes(
        n_layer=config.num_hidden_layers,
        nheads=config.num_heads,
        headdim=config.head_dim,
        ngroups=config.n_groups,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        dt_limit=(config.time_step_limit[0], config.time_step_limit[1]),
        eps=config.layer_norm_epsilon,
    )


def bamba_sizes(config: Any) -> _loop_hybrid.Sizes:
    """Returns the sizes of the Bamba case."""
    return _loop_hybrid.Sizes(
        names=_loop_hybrid.TRANSFORMERS,
        kinds="2a2",
        eps=config.rms_norm_eps,
        d_inner=20,
        d_state=3,
        heads=(6, 2, 5),
        nheads=4,
        ngroups=2,
        dt_limit=(0.2, 0.9),
        rotary=(4, 50.0, False),
    )


def jamba_sizes(config: Any) -> _loop_hybrid.Sizes:
    """Returns the sizes of the Jamba case."""
    return _loop_hybrid.Sizes(
        names=_loop_hybrid.TRANSFORMERS,
        kinds="1a1",
        eps=config.rms_norm_eps,
        d_inner=18,
        d_state=5,
        heads=(3, 1, 3),
        dt_rank=4,
    )


MAMBA = Kind("Mamba", _witness.random_weight, _loop_mamba1.loop, mamba1_sizes, mamba_answers)
FALCON = MAMBA._replace(model="FalconMamba")
MAMBA2 = Kind("Mamba2", _loop_mamba2.random_weight, _loop_mamba2.loop, mamba2_sizes, mamba_answers)
BAMBA = Kind(
    "Bamba",
    _loop_hybrid.random_weight,
    _loop_hybrid.loop,
    bamba_sizes,
    lambda model, tokens: hybrid_answers(model, tokens, "2a2"),
)
JAMBA = BAMBA._replace(
    model="Jamba",
    sizes=jamba_sizes,
    answers=lambda model, tokens: hybrid_answers(model, tokens, "1a1"),
)

# --- cases ---------------------------------------------------------------------------------------

# Options that do not change the result differ from their defaults, since a reader must accept them.
# `rescale_prenorm_residual` is not among them: transformers 5.24 rescales `out_proj` with it
# whenever it loads.
UNUSED = {
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
UNUSED_IN_HYBRIDS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.07,
    "use_cache": False,
}

# All sizes differ from one another, so that no axis can be mistaken for another.
TRANSFORMERS_CASES = {
    # `intermediate_size` contradicts `expand`, and wins.
    "mamba_tiny": TransformersCase(
        kind=MAMBA,
        seed=2,
        length=13,
        config={
            **UNUSED,
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
    ),
    # The rank "auto" is ceil(17 / 16) = 2; transformers resolves it before it writes the config.
    "mamba_tied": TransformersCase(
        kind=MAMBA,
        seed=7,
        length=11,
        config={
            **UNUSED,
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
    ),
    # The exact gelu (erf) applies to the convolution only; the gate stays a silu.
    "mamba_act": TransformersCase(
        kind=MAMBA,
        seed=1,
        length=17,
        config={
            **UNUSED,
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
    ),
    # `expand` is far from `intermediate_size`, as in the published config.
    "falcon_tiny": TransformersCase(
        kind=FALCON,
        seed=4,
        length=13,
        config={
            **UNUSED,
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
    ),
    # Half of the step sizes exceed the limits, and 17 tokens are several chunks of transformers.
    "mamba2_tiny": TransformersCase(
        kind=MAMBA2,
        seed=3,
        length=17,
        config={
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
            # Options that do not change the result differ from their defaults too.
            "pad_token_id": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.07,
            "time_step_min": 0.002,
            "time_step_max": 0.2,
            "time_step_floor": 2e-4,
            "time_step_rank": 5,
            "use_cache": False,
        },
    ),
    "bamba_tiny": TransformersCase(
        kind=BAMBA,
        seed=6,
        length=15,
        config={
            "vocab_size": 23,
            "hidden_size": 10,
            "intermediate_size": 7,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 5,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.9,
            },
            "mamba_n_heads": 4,
            "mamba_d_head": 5,
            "mamba_n_groups": 2,
            "mamba_d_state": 3,
            "mamba_d_conv": 3,
            "mamba_chunk_size": 4,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "time_step_limit": (0.2, 0.9),
            "rms_norm_eps": 3e-4,
            "tie_word_embeddings": True,
            "pad_token_id": None,
            "max_position_embeddings": 99,
            "num_logits_to_keep": 3,
            "z_loss_coefficient": 0.1,
            **UNUSED_IN_HYBRIDS,
        },
    ),
    "jamba_tiny": TransformersCase(
        kind=JAMBA,
        seed=1,
        length=13,
        config={
            "vocab_size": 23,
            "hidden_size": 9,
            "intermediate_size": 7,
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "mamba_expand": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 3,
            "mamba_dt_rank": 4,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "rms_norm_eps": 3e-4,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "max_position_embeddings": 99,
            "expert_layer_offset": 0,
            "expert_layer_period": 3,
            "num_experts_per_tok": 1,
            "router_aux_loss_coef": 0.1,
            **UNUSED_IN_HYBRIDS,
        },
    ),
}


def make_transformers(case: str, out: Path, sdist: Path | None) -> None:
    """Makes a case from transformers, which needs no official code."""
    del sdist
    for package in ("mamba_ssm", "causal_conv1d", "mambapy"):
        assert importlib.util.find_spec(package) is None, f"transformers would use {package}"
    kind, seed, length, fields = TRANSFORMERS_CASES[case]
    causal_lm = getattr(transformers, f"{kind.model}ForCausalLM")
    rng = np.random.default_rng(seed)
    model = causal_lm(getattr(transformers, f"{kind.model}Config")(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kind.random_weight(rng, name, tuple(parameter.shape)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = causal_lm.from_pretrained(folder).eval()
        weights = {k: torch.from_numpy(v) for k, v in load_file(folder / WEIGHTS).items()}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), f"{name} differs from the file"
        tokens = torch.from_numpy(rng.integers(model.config.vocab_size, size=length))
        with torch.no_grad():
            logits_float32 = model(tokens[None], use_cache=False).logits[0]
        assert logits_float32.dtype == torch.float32

        witness = kind.answers(model.double(), tokens)
        check(case, witness, loop_answers(kind.loop, weights, tokens, kind.sizes(model.config)))
        check_size_of_values(witness)
        rounding = (logits_float32 - witness["logits"]).abs().max() / witness["logits"].abs().max()
        print(f"  float32 logits differ by {rounding:.1e}; greedy {witness['greedy'].tolist()}")
        save(folder, {"tokens": tokens, "logits_float32": logits_float32, **witness})
        publish(folder, out / case)
