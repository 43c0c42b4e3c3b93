"""Comparisons with golden files and with transformers as installed."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, load_state_dict, save_pretrained
from tests.support.checkpoints import BIASED, HYBRIDS, ODD, assert_same, config


GOLDEN = Path(__file__).parents[1] / "golden"

# The layout of each golden checkpoint.
GOLDEN_LAYOUTS = {
    "mamba_tiny": "transformers",
    "mamba_tied": "transformers",
    "state_spaces_mamba": "state-spaces",
    "mamba2_tiny": "transformers",
    "falcon_tiny": "transformers",
    "state_spaces_mamba2": "state-spaces",
    "bamba_tiny": "transformers",
    "jamba_tiny": "transformers",
    "granite_tiny": "transformers",
    "falcon_h1_tiny": "transformers",
    "state_spaces_hybrid": "state-spaces",
    "state_spaces_mamba3": "state-spaces",
    "state_spaces_mamba3_mimo": "state-spaces",
}


def difference(got: Any, want: Any) -> float:
    """Returns the largest difference, relative to the largest entry of `want`."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.all(np.isfinite(got))
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def nearest_turn(got: Any, want: Any) -> np.ndarray:
    """Returns the angles `got`, each shifted by the whole turns that bring it closest to `want`."""
    got = np.asarray(got, np.float64)
    return got - 2 * np.pi * np.round((got - want) / (2 * np.pi))


class Run(NamedTuple):
    """Everything that a golden file records of one model and one text."""

    loss: Array
    logits: Array
    states: tuple[Any, ...]
    hidden: PyTree
    grads: mbx.LanguageModel


@eqx.filter_jit
def run(model: mbx.LanguageModel, tokens: Array) -> Run:
    """Computes loss, logits, final states, hidden states and gradients."""

    def loss(model: mbx.LanguageModel) -> tuple[Array, tuple[Array, Any]]:
        logits, state = model.scan(tokens)
        log_probs = jax.nn.log_softmax(logits[:-1])
        of_targets = jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)
        return -jnp.mean(of_targets), (logits, state)

    (value, (logits, state)), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return Run(value, logits, state, model.hidden_states(tokens), grads)


# The multipliers of keys and values in the case `falcon_h1_tiny`. Our cache does not contain them:
# the softmax scale and the scale of the output do.
FALCON_CACHE = {"k": 1.2 * 0.8, "v": 1.2}


def named_state(i: int, state: Any, golden: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the arrays of the state of layer `i` under the names and shapes of golden files."""
    if isinstance(state, tuple):
        mamba, cache = (named_state(i, part, golden) for part in state)
        return mamba | {name: FALCON_CACHE[name[-1]] * cache[name] for name in cache}
    if isinstance(state, mbx.KVCache):
        return {f"state.{i}.k": state.k, f"state.{i}.v": state.v}
    if isinstance(state, mbx.Mamba3State):
        angle = nearest_turn(state.angle, golden[f"state.{i}.angle"])
        named = {"angle": angle, "ssm": state.ssm, "k": state.k, "v": state.v}
        return {f"state.{i}.{name}": array for name, array in named.items()}
    return {f"state.{i}.conv": state.conv.T, f"state.{i}.ssm": jnp.moveaxis(state.ssm, 0, -1)}


# Models that we save and transformers loads, by model type and name.
OURS: dict[str, dict[str, mbx.LanguageModelConfig]] = {
    "mamba": {
        "odd": config(ODD, norm_eps=3e-4, padded_vocab_size=16),
        "biased_untied": config(BIASED, tie_embeddings=False, residual_in_fp32=False),
        "wide_taps": config(
            mbx.Mamba1Config(d_model=11, d_inner=37, d_state=5, d_conv=2, dt_rank=9, bias=True),
            n_layer=3,
            norm_eps=1e-3,
        ),
    },
    "falcon_mamba": {
        "eps": config(
            mbx.Mamba1Config(
                d_model=6,
                d_inner=9,
                d_state=3,
                d_conv=5,
                dt_rank=2,
                select_norm="weightless",
                select_norm_eps=0.03,
            ),
            tie_embeddings=False,
        ),
        "biased": config(
            mbx.Mamba1Config(
                d_model=9, d_state=5, bias=True, conv_bias=False, select_norm="weightless"
            ),
            tie_embeddings=False,
        ),
    },
    "mamba2": {
        "groups": config(
            mbx.Mamba2Config(
                d_model=7, d_inner=21, d_state=5, d_conv=3, headdim=3, ngroups=1, norm_eps=3e-4
            ),
            norm_eps=3e-4,
            padded_vocab_size=16,
        ),
        "biased_untied": config(
            mbx.Mamba2Config(
                d_model=9, d_state=6, headdim=3, ngroups=3, bias=True, conv_bias=False
            ),
            tie_embeddings=False,
            residual_in_fp32=False,
        ),
        "limits": config(
            mbx.Mamba2Config(
                d_model=5, d_inner=20, d_state=3, headdim=5, ngroups=2, dt_limit=(0.4, 1.0)
            ),
            n_layer=3,
        ),
        "lower_limit": config(
            mbx.Mamba2Config(
                d_model=4, d_inner=24, d_state=3, headdim=3, ngroups=4, dt_limit=(0.7, math.inf)
            )
        ),
    },
    "bamba": {name: HYBRIDS["transformers"][name] for name in ("bamba", "bamba_bias")},
    "jamba": {name: HYBRIDS["transformers"][name] for name in ("jamba", "jamba_untied")},
    # transformers cannot run a model of this type without attention.
    "granitemoehybrid": {
        name: HYBRIDS["transformers"][name]
        for name in ("granite", "granite_rope", "granite_attention", "granite_experts")
    },
    "falcon_h1": {name: HYBRIDS["transformers"][name] for name in ("falcon_h1", "falcon_h1_norm")},
}

# Configs of models that transformers saves and we load, by model type and name.
THEIRS: dict[str, dict[str, dict[str, Any]]] = {
    "mamba": {
        "odd": {
            "vocab_size": 31,
            "hidden_size": 17,
            "state_size": 5,
            "num_hidden_layers": 3,
            "layer_norm_epsilon": 2e-3,
            "expand": 3,
            "intermediate_size": 29,
            "conv_kernel": 6,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": False,
            "time_step_rank": 7,
            "tie_word_embeddings": False,
            "initializer_range": 0.5,
            "time_step_floor": 1e-3,
        },
        "default": {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2},
        "expand": {"vocab_size": 30, "hidden_size": 9, "num_hidden_layers": 1, "expand": 3},
    },
    "falcon_mamba": {
        # As published: `intermediate_size` is not `expand` times `hidden_size`.
        "published": {
            "vocab_size": 31,
            "hidden_size": 16,
            "expand": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "layer_norm_epsilon": 1e-5,
            "time_step_rank": 5,
            "tie_word_embeddings": False,
        },
        "every_field": {
            "vocab_size": 30,
            "hidden_size": 9,
            "expand": 3,
            "state_size": 5,
            "num_hidden_layers": 1,
            "layer_norm_epsilon": 2e-3,
            "mixer_rms_eps": 0.1,
            "conv_kernel": 6,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": False,
        },
    },
    "mamba2": {
        "odd": {
            "vocab_size": 31,
            "hidden_size": 15,
            "expand": 3,
            "num_heads": 9,
            "head_dim": 5,
            "n_groups": 3,
            "state_size": 7,
            "num_hidden_layers": 3,
            "layer_norm_epsilon": 2e-3,
            "conv_kernel": 6,
            "chunk_size": 11,
            "use_bias": True,
            "use_conv_bias": False,
            "residual_in_fp32": False,
            "tie_word_embeddings": False,
            "initializer_range": 0.5,
            "time_step_limit": [0.3, 1.1],
        },
        "default_groups": {
            "vocab_size": 30,
            "hidden_size": 16,
            "num_heads": 16,
            "head_dim": 2,
            "num_hidden_layers": 2,
            "chunk_size": 8,
        },
        "tied": {
            "vocab_size": 30,
            "hidden_size": 9,
            "num_heads": 6,
            "head_dim": 3,
            "n_groups": 1,
            "num_hidden_layers": 1,
            "tie_word_embeddings": True,
        },
    },
    "bamba": {
        "bamba": {
            "vocab_size": 30,
            "hidden_size": 32,
            "intermediate_size": 7,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_layer_indices": [0, 2],
            "mamba_n_heads": 8,
            "mamba_d_state": 3,
        }
    },
    "jamba": {
        "jamba": {
            "vocab_size": 30,
            "hidden_size": 12,
            "intermediate_size": 7,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "num_experts": 1,
            "tie_word_embeddings": True,
        }
    },
    "granitemoehybrid": {
        "every_field": {
            "vocab_size": 30,
            "hidden_size": 24,
            "shared_intermediate_size": 7,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "attention_multiplier": 0.3,
            "position_embedding_type": "rope",
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
            "embedding_multiplier": 12,
            "residual_multiplier": 0.22,
            "logits_scaling": 3,
            "mamba_expand": 3,
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 3,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "time_step_limit": [0.4, 1.0],
            "rms_norm_eps": 1e-3,
            "num_local_experts": 0,
            "tie_word_embeddings": True,
        },
        # Without any multiplier, we would save it as a Bamba model.
        "default": {
            "vocab_size": 30,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "num_attention_heads": 4,
            "num_local_experts": 0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.5,
            "position_embedding_type": "rope",
        },
        "attention_alone": {
            "vocab_size": 30,
            "hidden_size": 32,
            "shared_intermediate_size": 7,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "num_attention_heads": 4,
            "mamba_n_heads": 1,
            "num_local_experts": 0,
            "attention_multiplier": 0.2,
            "position_embedding_type": "nope",
        },
        "experts": {
            "vocab_size": 30,
            "hidden_size": 24,
            "intermediate_size": 5,
            "shared_intermediate_size": 7,
            "num_hidden_layers": 2,
            "layer_types": ["attention", "mamba"],
            "num_attention_heads": 4,
            "position_embedding_type": "nope",
            "residual_multiplier": 0.22,
            "mamba_n_heads": 8,
            "mamba_d_state": 5,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
        },
    },
    "falcon_h1": {
        "multipliers": {
            "vocab_size": 30,
            "hidden_size": 12,
            "intermediate_size": 7,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
            "mamba_d_ssm": 15,
            "mamba_n_heads": 5,
            "mamba_n_groups": 5,
            "mamba_d_state": 7,
            "mamba_d_conv": 3,
            "mamba_norm_before_gate": False,
            "mamba_chunk_size": 11,
            "rms_norm_eps": 1e-3,
            "lm_head_multiplier": 0.4,
            "embedding_multiplier": 5.7,
            "mlp_multipliers": [0.7, 1.3],
            "key_multiplier": 0.8,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            "ssm_multipliers": [0.4, 0.2, 0.7, 0.5, 1.3],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.6,
            "tie_word_embeddings": True,
        },
        "biases": {
            "vocab_size": 30,
            "hidden_size": 12,
            "intermediate_size": 7,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "mamba_d_ssm": None,
            "mamba_expand": 3,
            "mamba_n_heads": 6,
            "mamba_n_groups": 2,
            "mamba_d_state": 7,
            "mamba_conv_bias": False,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "time_step_limit": [0.4, 1.0],
            "key_multiplier": 0.8,
            "attention_out_multiplier": 0.9,
            "ssm_multipliers": [0.4, 0.2, 0.7, 0.5, 1.3],
            "ssm_out_multiplier": 0.6,
            "mlp_multipliers": [0.7, 1.3],
        },
        "default": {
            "vocab_size": 30,
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 7,
            "mamba_n_heads": 16,
        },
    },
}


def their_model(torch: Any, fields: dict[str, Any], model_type: str = "mamba") -> Any:
    """Builds a transformers model with random weights."""
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = _any_width(transformers.AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def _any_width(model: Any) -> Any:
    """Returns a transformers model whose experts may have any width, in place of multiples of 4."""
    model.set_experts_implementation("eager")
    return model


def their_logits(torch: Any, model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits of a transformers model."""
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].float().numpy()


def load_theirs(folder: Path | str, architecture: str = "MambaForCausalLM") -> Any:
    """Loads a checkpoint with transformers and asserts that all tensors matched.

    transformers itself only warns about tensors that it does not find.
    """
    import transformers  # pyright: ignore[reportMissingImports]

    load = getattr(transformers, architecture).from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    return _any_width(model.eval())


def check_they_load(
    torch: Any,
    model: mbx.LanguageModel,
    folder: Path,
    architecture: str,
    *,
    seq: int = 25,
    max_shard_size: int | None = 2000,
) -> None:
    """Asserts that transformers loads what we save, bit by bit, and computes the same logits."""
    model = jax.tree.map(lambda leaf: 0.5 * leaf, model)
    save_pretrained(model, folder, max_shard_size=max_shard_size)
    theirs = load_theirs(folder, architecture)
    tokens = np.arange(seq) * 7 % 13
    logits = eqx.filter_jit(model)(jnp.asarray(tokens))
    assert difference(logits, their_logits(torch, theirs, tokens)) < 1e-5
    # transformers may have other names in memory than in files.
    named = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert_same(load_state_dict(model, named), model)


# Fields of a transformers config that we do not keep: how texts end, and the model's origin.
NOT_KEPT = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"}


def check_we_load(
    torch: Any,
    theirs: Any,
    folder: Path,
    changed: set[str],
    *,
    seq: int = 25,
    max_shard_size: str = "3KB",
) -> tuple[np.ndarray, np.ndarray]:
    """Asserts that we load what transformers saves, and that transformers loads what we save of it.

    The configs must agree except in the fields `changed`. Returns the logits of transformers before
    and after the round trip.
    """
    theirs.save_pretrained(folder / "theirs", max_shard_size=max_shard_size)
    model = from_pretrained(folder / "theirs")
    tokens = np.arange(seq) * 11 % 29
    want = their_logits(torch, theirs, tokens)
    assert difference(eqx.filter_jit(model)(jnp.asarray(tokens)), want) < 1e-5

    save_pretrained(model, folder / "ours")
    back = load_theirs(folder / "ours", type(theirs).__name__)
    there, here = theirs.config.to_dict(), back.config.to_dict()
    assert {k for k in there if there[k] != here.get(k)} <= NOT_KEPT | changed
    return want, their_logits(torch, back, tokens)
