"""Models of transformers: how they run in float64, and the loops that they are compared with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tests.golden import _loop_hybrid, _loop_mamba1, _loop_mamba2, _witness
from tests.golden._witness import (
    Tensors,
    greedy,
    honest_float64,
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
    if model.config.model_type in ("bamba", "falcon_h1"):
        # The frequencies were computed in float32 before the model was cast to float64.
        rotary, c = model.model.rotary_emb, model.config
        with honest_float64():
            dim = int(c.head_dim * c.rope_parameters.get("partial_rotary_factor", 1.0))
            powers = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            rotary.inv_freq = c.rope_parameters["rope_theta"] ** -powers
    # `output_hidden_states` would leave out the stream after the last block.
    hidden = []
    final = "norm" if model.config.model_type == "granitemoehybrid" else "final_layernorm"
    for module in (*model.model.layers, getattr(model.model, final)):
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
        if kind in "ap":
            answer |= {f"state.{i}.k": layer.keys[0], f"state.{i}.v": layer.values[0]}
        if kind != "a":
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


def granite_sizes(config: Any) -> _loop_hybrid.Sizes:
    """Returns the sizes of the Granite case."""
    return _loop_hybrid.Sizes(
        names=_loop_hybrid.GRANITE,
        kinds="2a2",
        eps=config.rms_norm_eps,
        d_inner=20,
        d_state=3,
        heads=(6, 2, 4),
        nheads=4,
        ngroups=2,
        dt_limit=(0.2, 0.9),
        scale=0.4,
        embedding_multiplier=0.6,
        residual_multiplier=1.3,
        logits_divisor=1.5,
    )


def falcon_h1_sizes(config: Any) -> _loop_hybrid.Sizes:
    """Returns the sizes of the Falcon-H1 case."""
    return _loop_hybrid.Sizes(
        names=_loop_hybrid.TRANSFORMERS,
        kinds="pp",
        eps=config.rms_norm_eps,
        d_inner=15,
        d_state=3,
        heads=(6, 2, 4),
        nheads=5,
        ngroups=5,
        dt_limit=(0.2, 0.9),
        rotary=(4, 1e11, False),
        embedding_multiplier=1.7,
        logits_divisor=1 / 0.6,
        ssm_multipliers=tuple(config.ssm_multipliers),
        mlp_multipliers=(0.7, 1.3),
        key_multiplier=0.8,
        mamba_in_out=(1.25, 0.6),
        attention_in_out=(1.2, 0.9),
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
GRANITE = BAMBA._replace(model="GraniteMoeHybrid", sizes=granite_sizes)
FALCON_H1 = BAMBA._replace(
    model="FalconH1",
    sizes=falcon_h1_sizes,
    answers=lambda model, tokens: hybrid_answers(model, tokens, "pp"),
)
