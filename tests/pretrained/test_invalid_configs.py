"""Invalid configs, and what the errors say. Those of Mamba-1 are in `test_errors.py`."""

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mamba_eqx.pretrained import (
    CheckpointError,
    _checkpoint,
    _load,
    from_pretrained,
    save_pretrained,
)
from mamba_eqx.pretrained.layouts import LAYOUTS
from tests.support.checkpoints import DROPPED, FAMILIES, edit_config, make


# By family, layout and name of a model: fields of its config that are edited, and the error.
INVALID = {
    ("mamba2", "transformers", "tied"): [
        ({"num_heads": 5}, "`num_heads`.*times head_dim=3 must be .*= 18.*is 5"),
        ({"expand": 3.0}, "`expand`.*integer.*3.0"),
        ({"n_groups": 4}, "`ngroups` must divide.*ngroups=4 and 6 heads"),
        ({"n_groups": 3}, "and should be"),
        ({"hidden_act": "gelu"}, "`hidden_act`.*must be 'silu'"),
        ({"time_step_limit": [0.1]}, "`time_step_limit`.*two numbers"),
        ({"time_step_limit": [2, 1]}, "`time_step_limit`.*two numbers"),
        ({"time_step_limit": [-1, 1]}, "`time_step_limit`.*two numbers"),
        ({"time_step_limit": [0, 0]}, "`time_step_limit`.*two numbers"),
        ({"time_step_limit": [math.inf] * 2}, "`time_step_limit`.*two numbers"),
        ({"time_step_limit": [True, 1]}, "`time_step_limit`.*two numbers"),
        ({"time_step_limit": [math.nan, 1]}, r"`time_step_limit\[0\]` is NaN"),
        ({"D_has_hdim": True}, "unknown meaning.*'D_has_hdim'"),
        ({"tie_word_embeddings": DROPPED}, "missing: lm_head.weight"),
        ({"hidden_size": 2**24, "expand": 2**24}, "`expand`"),
        ({"state_size": 2**24}, "should be"),
    ],
    ("mamba2", "state-spaces", "tied"): [
        ({"ssm_cfg.d_state": 7}, "should be"),
        ({"ssm_cfg.d_ssm": 21}, "`d_ssm` must be at most `d_inner`.*d_ssm=21"),
        ({"ssm_cfg.d_ssm": 12}, "should be"),
        ({"ssm_cfg.d_ssm": "12"}, "`d_ssm` of `ssm_cfg`.*integer"),
        ({"ssm_cfg.expand": 2.5}, "`expand` of `ssm_cfg`.*2.5"),
        ({"ssm_cfg.headdim": 4}, "`headdim` must divide `d_inner`"),
        ({"ssm_cfg.rmsnorm": False}, "2 unexpected: .*mixer.norm.weight"),
        ({"ssm_cfg.D_has_hdim": True}, r"mixer.D is \(6,\) and should be \(18,\)"),
        ({"ssm_cfg.dt_limit": [0.5, "Infinity"]}, "`dt_limit`.*two numbers"),
        ({"ssm_cfg.process_group": 1}, "`ssm_cfg` has fields.*'process_group'"),
    ],
    ("mamba3", "state-spaces", "siso"): [
        ({"ssm_cfg.d_state": 7}, "should be"),
        ({"ssm_cfg.ngroups": 4}, "`ngroups` must divide.*ngroups=4 and 6 heads"),
        ({"ssm_cfg.headdim": 4}, "`headdim` must divide `d_inner`"),
        (
            {"ssm_cfg.rope_fraction": 0.25},
            "`rope_fraction` of `ssm_cfg` must be 0.5 or 1",
        ),
        ({"ssm_cfg.d_state": 3}, "`d_state \\* rope_fraction` must be at least 2"),
        ({"ssm_cfg.is_mimo": True, "ssm_cfg.mimo_rank": 2}, "missing: .*mimo_x"),
        ({"ssm_cfg.is_mimo": 1}, "`is_mimo` of `ssm_cfg` must be true or false"),
        ({"ssm_cfg.mimo_rank": 0}, "`mimo_rank` of `ssm_cfg` must be an integer"),
        ({"ssm_cfg.is_outproj_norm": True}, "missing: .*mixer.norm.weight"),
        ({"ssm_cfg.A_floor": 0}, "`A_floor` of `ssm_cfg` must be above 0"),
        ({"ssm_cfg.A_activation": "exp"}, "`A_activation`.*'heavy_tail' or 'softplus'"),
        ({"ssm_cfg.expand": 0.1}, "`expand` of `ssm_cfg`"),
        ({"ssm_cfg.d_conv": 4}, "`ssm_cfg` has fields.*'d_conv'"),
    ],
    ("hybrid", "transformers", "bamba"): [
        ({"attn_layer_indices": [3]}, "`attn_layer_indices`.*from 0 to 2"),
        ({"attn_layer_indices": [1, 1]}, "different integers"),
        ({"attn_layer_indices": [True]}, "different integers"),
        ({"attn_layer_indices": [2]}, "missing"),
        ({"mlp_bias": True}, "`mlp_bias`.*must be False"),
        ({"mlp_bias": 0}, "`mlp_bias`.*must be False"),
        ({"hidden_act": "gelu"}, "`hidden_act`.*must be 'silu'"),
        ({"head_dim": DROPPED}, "`num_attention_heads`.*must divide"),
        ({"head_dim": None}, "`num_attention_heads`.*must divide"),
        ({"attn_rotary_emb": 8}, "`attn_rotary_emb`.*0.5 of the 8"),
        ({"partial_rotary_factor": 0.25}, "must be 0.5"),
        ({"rope_scaling": {"type": "yarn"}}, "must be None"),
        ({"rope_parameters.rope_type": "yarn"}, "must be 'default'"),
        ({"rope_parameters.factor": 2.0}, "unknown meaning.*'factor"),
        ({"rope_parameters": 3}, "`rope_parameters` must be a JSON obj"),
        ({"mamba_n_heads": 5}, "`mamba_n_heads`.*times 3 per head.*18"),
        ({"num_key_value_heads": 3}, "must divide `nheads`"),
        ({"sliding_window": 4}, "unknown meaning.*'sliding_window'"),
    ],
    ("hybrid", "transformers", "jamba"): [
        ({"num_experts": 2, "expert_layer_offset": 0}, "missing: .*feed_forward.router"),
        ({"num_experts": DROPPED, "expert_layer_offset": 0}, "missing: .*feed_forward.experts.0"),
        ({"num_experts": 0}, "`num_experts`.*must be an integer from 1"),
        ({"expert_layer_offset": 9}, "below expert_layer_period=2"),
        ({"sliding_window": 4}, "`sliding_window`.*must be None"),
        ({"attn_layer_offset": 5}, "below attn_layer_period=3"),
        ({"mamba_inner_layernorms": False}, "must be True"),
        ({"attention_bias": True}, "unknown meaning"),
    ],
    ("hybrid", "transformers", "jamba_experts"): [
        ({"num_experts": 1}, "missing: .*unexpected: .*feed_forward.experts.0"),
        ({"num_experts": 6}, r"missing: model.layers.1.feed_forward.experts.5.up_proj.weight"),
        ({"num_experts": 2**24}, "`num_experts`.*must be an integer from 1 to 1024"),
        ({"num_experts": 2}, "`top_k`.*`n_experts`"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok`.*must be an integer from 1"),
        ({"intermediate_size": 8}, "should be"),
    ],
    ("hybrid", "transformers", "nemotron_h"): [
        ({"hybrid_override_pattern": "-M-M*M*"}, "a mixer directly before the MLP at index 0"),
        ({"hybrid_override_pattern": "M--M*M*"}, "a mixer directly before the MLP at index 2"),
        ({"hybrid_override_pattern": "M-MX*-M*"}, "must be 1 to 1024 of 'M', '\\*', '-'"),
        ({"hybrid_override_pattern": ""}, "must be 1 to 1024 of"),
        ({"hybrid_override_pattern": "M-" * 513}, "must be 1 to 1024 of"),
        ({"hybrid_override_pattern": DROPPED}, "`hybrid_override_pattern`.*is required"),
        ({"hybrid_override_pattern": "M-M*-M"}, "`num_hidden_layers`.*be the length.*, 6, but"),
        ({"hybrid_override_pattern": "M-M*-M*-"}, "`num_hidden_layers`.*be the length.*, 8, but"),
        ({"hybrid_override_pattern": "*-M*-M*", "num_hidden_layers": 7}, "unexpected: .*A_log"),
        ({"layers_block_type": ["mamba"] * 7}, "must agree with `hybrid_override_pattern`"),
        ({"layers_block_type": "M-M*-M*"}, "must be 1 to 1024 of 'mamba', 'attention', 'mlp'"),
        ({"layers_block_type": ["mamba", 3]}, "must be 1 to 1024 of 'mamba'"),
        ({"mamba_num_heads": 4}, "`ngroups` must divide.*ngroups=5 and 4 heads"),
        ({"mamba_num_heads": 10}, "should be"),
        ({"mamba_num_heads": 5.0}, "`mamba_num_heads`.*integer.*5.0"),
        ({"mamba_num_heads": 2**24, "mamba_head_dim": 2}, "`mamba_num_heads`.*times 2 must be"),
        ({"attention_head_dim": 16}, "`attention_head_dim`.*must be head_dim=8"),
        ({"rms_norm_eps": 1e-6}, "`rms_norm_eps`.*must be layer_norm_epsilon=1e-05"),
        ({"norm_eps": 1e-6}, "`norm_eps`.*must be layer_norm_epsilon=1e-05"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings`.*must be False"),
        ({"attention_bias": True}, "`attention_bias`.*must be False"),
        ({"mamba_proj_bias": True}, "`mamba_proj_bias`.*must be False"),
        ({"mlp_bias": True}, "missing: .*up_proj.bias"),
        ({"mamba_hidden_act": "gelu"}, "`mamba_hidden_act`.*must be 'silu'"),
        ({"mlp_hidden_act": "silu"}, "`mlp_hidden_act`.*must be 'relu2'"),
        ({"sliding_window": 4}, "`sliding_window`.*must be None"),
        ({"hidden_act": "relu2"}, "unknown meaning.*'hidden_act'"),
    ],
    ("hybrid", "transformers", "granite"): [
        ({"num_local_experts": DROPPED}, "missing: .*layers.0.block_sparse_moe.router"),
        ({"num_local_experts": -1}, "`num_local_experts`.*must be an integer from 0"),
        ({"layer_types": ["mamba"] * 2}, "`layer_types`.*num_hidden_layers=3 times"),
        ({"layer_types": ["mamba", "moe", "mamba"]}, "`layer_types`.*num_hidden_layers=3 times"),
        ({"layer_types": ["mamba", [], "mamba"]}, "`layer_types`.*num_hidden_layers=3 times"),
        ({"layer_types": DROPPED}, "missing: .*layers.1.mamba"),
        ({"position_embedding_type": "alibi"}, "must be None or 'nope' or 'rope'"),
        ({"residual_multiplier": 0}, "`residual_multiplier`.*must be above 0"),
        ({"embedding_multiplier": None}, "`embedding_multiplier`.*must be a number"),
        ({"attention_multiplier": "1"}, "`attention_multiplier`.*must be a number"),
        ({"logits_scaling": 1e-9}, "1 / logits_scaling of the config must be .*at most"),
        ({"logits_scaling": -1}, "`logits_scaling`.*must be above 0"),
        ({"normalization_function": "layernorm"}, "must be 'rmsnorm'"),
        ({"shared_intermediate_size": 8}, r"input_linear.weight is \(18, 6\).*be \(16, 6\)"),
        ({"mlp_bias": True}, "`mlp_bias`.*must be False"),
        ({"sliding_window": 4}, "unknown meaning.*'sliding_window'"),
    ],
    ("hybrid", "transformers", "granite_experts"): [
        ({"num_local_experts": 0}, "unexpected: .*block_sparse_moe"),
        ({"num_local_experts": 4}, r"output_linear.weight is \(5, 6, 7\).*be \(4, 6, 7\)"),
        ({"num_experts_per_tok": 6}, "`top_k` must be .*n_experts"),
        ({"num_experts_per_tok": 0}, "`num_experts_per_tok`.*must be an integer from 1"),
        ({"intermediate_size": 8}, r"input_linear.weight is \(5, 14, 6\).*be \(5, 16, 6\)"),
        ({"shared_intermediate_size": 0}, "`shared_intermediate_size`.*must be an integer from 1"),
    ],
    ("hybrid", "transformers", "granite_rope"): [
        ({"rope_parameters.partial_rotary_factor": 0.5}, "no `partial_rotary_factor` other than 1"),
        ({"logits_scaling": 2.0}, "`logits_multiplier`.*must be 1 / logits_scaling = 0.5"),
    ],
    ("hybrid", "transformers", "nemotron_h_experts"): [
        ({"hybrid_override_pattern": "ME*E*E"}, "missing: .*experts.0.up_proj.weight"),
        ({"hybrid_override_pattern": "M-*-*E"}, "missing: .*layers.1.mixer.up_proj.weight"),
        ({"hybrid_override_pattern": "MEE*-*"}, "a mixer directly before the MLP at index 2"),
        ({"n_routed_experts": 2**24}, "`n_routed_experts`.*integer from 1 to 1024"),
        ({"n_routed_experts": 9}, "missing: .*layers.1.mixer.experts.6.up_proj.weight"),
        (
            {"n_routed_experts": 3, "n_group": 1, "topk_group": 1},
            "unexpected: .*layers.1.mixer.experts.3",
        ),
        ({"n_routed_experts": 4}, "`n_group` must divide `n_experts`"),
        ({"num_experts_per_tok": 5}, "2 chosen groups have 4 experts, but got top_k=5"),
        (
            {"moe_intermediate_size": 8},
            r"experts.0.up_proj.weight is \(7, 6\) and should be \(8, 6",
        ),
        ({"moe_shared_expert_intermediate_size": 8}, "shared_experts.up_proj.weight is"),
        ({"moe_latent_size": 4}, "missing: .*mixer.fc1_latent_proj.weight"),
        ({"moe_latent_size": 0}, "`moe_latent_size`.*integer from 1"),
        ({"n_shared_experts": 2}, "`n_shared_experts`.*must be 1"),
        ({"routed_scaling_factor": 0}, "`routed_scaling_factor`.*above 0"),
        ({"norm_topk_prob": 1}, "`norm_topk_prob`.*true or false"),
        ({"topk_group": 4}, "`topk_group` must be at most `n_group`"),
        ({"mlp_bias": True}, "`mlp_bias`.*must be False"),
    ],
    ("hybrid", "transformers", "falcon_h1"): [
        ({"attn_layer_indices": [0]}, "`attn_layer_indices`.*must be None"),
        ({"mamba_use_mlp": False}, "`mamba_use_mlp`.*must be True"),
        ({"mamba_d_ssm": 18}, "`mamba_n_heads`.*times 3 per head must be mamba_d_ssm.* = 18"),
        ({"mamba_d_ssm": None}, "`mamba_n_heads`.*hidden_size .* mamba_expand.* = 12"),
        ({"mamba_rms_norm": True}, "2 missing: .*mamba.norm.weight"),
        ({"mamba_norm_before_gate": None}, "`mamba_norm_before_gate`.*true or false"),
        ({"projectors_bias": True}, "`projectors_bias`.*must be mamba_proj_bias=False"),
        ({"attention_bias": True}, "missing: .*self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "missing: .*feed_forward.up_proj.bias"),
        ({"ssm_multipliers": [1.0] * 4}, "`ssm_multipliers`.*must be 5 numbers above 0"),
        ({"ssm_multipliers": [1.0, 1.0, 1.0, 1.0, 0]}, "must be 5 numbers above 0"),
        ({"ssm_multipliers": 1.0}, "must be 5 numbers above 0"),
        ({"mlp_multipliers": [1.0, True]}, "`mlp_multipliers`.*must be 2 numbers above 0"),
        ({"ssm_in_multiplier": -1}, "`ssm_in_multiplier`.*must be above 0"),
        ({"ssm_out_multiplier": 0}, "`ssm_out_multiplier`.*must be above 0"),
        ({"key_multiplier": None}, "`key_multiplier`.*must be a number"),
        (
            {"attention_in_multiplier": 1e-200},
            r"sqrt\(head_dim\) of the config must be",
        ),
        ({"attention_in_multiplier": "1"}, "`attention_in_multiplier`.*must be a number"),
        ({"attention_out_multiplier": math.inf}, "`attention_out_multiplier`.*at most"),
        ({"lm_head_multiplier": 0}, "`lm_head_multiplier`.*must be above 0"),
        ({"rope_parameters.rope_theta": 1e16}, "`rope_theta`.*must be above 0 and at most"),
        ({"rope_parameters.partial_rotary_factor": 0.5}, "no `partial_rotary_factor` other than 1"),
        ({"head_dim": 7}, "`rotary_emb_dim` must be even"),
        ({"sliding_window": 4}, "unknown meaning.*'sliding_window'"),
    ],
    ("hybrid", "transformers", "falcon_h1_norm"): [
        ({"ssm_in_multiplier": 1.25}, "`ssm_in_multiplier`.*must be 1 in a model whose.*biases"),
        ({"attention_in_multiplier": 2.0}, "`attention_in_multiplier`.*must be 1.*biases"),
        ({"key_multiplier": 0.7}, r"`softmax_scale`.*must be attention_in_multiplier\*\*2"),
    ],
    ("hybrid", "state-spaces", "mamba2"): [
        ({"attn_layer_idx": [3]}, "`attn_layer_idx`.*from 0 to 2"),
        ({"attn_layer_idx": 1}, "`attn_layer_idx`.*must be a list"),
        ({"attn_cfg.causal": DROPPED}, "`causal`.*must be True"),
        ({"attn_cfg.mlp_dim": 256}, "`mlp_dim`.*must be 0"),
        ({"attn_cfg.num_heads": DROPPED}, "no `num_heads`"),
        ({"attn_cfg.window": 5}, "`attn_cfg` has fields.*'window'"),
        ({"attn_cfg.rotary_emb_dim": 5}, "`rotary_emb_dim` must be"),
        ({"attn_cfg.qkv_proj_bias": DROPPED, "attn_cfg.d_conv": 4}, "should"),
    ],
    ("mistral", "mistral", "untied"): [
        ({"dim": 63}, "`headdim` must divide"),
        ({"n_groups": 1}, "should be"),
        ({"n_layers": 2}, "missing"),
        ({"model_type": "transformer"}, "`model_type`.*must be 'mamba'"),
        ({"tie_embeddings": None}, "`tie_embeddings`.*true or false"),
        ({"d_state": 16}, "unknown meaning.*'d_state'"),
        ({"pad_vocab_size_multiple": 16}, "should be"),
    ],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, str, str]], Path]:
    """Saves each model once, and returns its folder."""

    @functools.cache
    def save(model: tuple[str, str, str]) -> Path:
        family, layout, name = model
        folder = tmp_path_factory.mktemp(name)
        save_pretrained(make(FAMILIES[family][layout][name]), folder, layout=layout)
        return folder

    return save


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [(model, *case) for model, cases in INVALID.items() for case in cases],
)
def test_invalid_config_is_refused(model, fields, message, saved, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(saved(model), folder)
    monkeypatch.setattr(_load, "to_jax", _nothing_is_loaded)
    edit_config(folder, fields, LAYOUTS[model[1]].config_file)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as error:
        from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_config_of_a_million_tensors_is_refused_at_once(saved, tmp_path, monkeypatch):
    """Without making their names, which would take a minute."""
    folder = tmp_path / "model"
    shutil.copytree(saved(("hybrid", "transformers", "jamba_experts")), folder)
    monkeypatch.setattr(_checkpoint, "renamed", lambda *_: dict.fromkeys(map(str, range(600))))
    monkeypatch.setattr("mamba_eqx.pretrained._load.assign", _nothing_is_loaded)
    experts = {"num_experts": 1024, "expert_layer_period": 1, "expert_layer_offset": 0}
    edit_config(folder, experts | {"num_hidden_layers": 500})
    with pytest.raises(
        CheckpointError, match=r"the config needs 1,5\d\d,\d\d\d tensors, but .* 600\."
    ):
        from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_number_of_tensors_is_the_length_of_the_table(family):
    for layout, models in FAMILIES[family].items():
        for config in models.values():
            chosen = LAYOUTS[layout]
            assert chosen.number_of_slots(config) == len(chosen.table(config))


def _nothing_is_loaded(*_: object) -> None:
    pytest.fail("an array was made before everything was checked")
