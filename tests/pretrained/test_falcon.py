"""Checkpoints of Falcon-Mamba: Mamba-1 with norms that have no weights, and so no tensors."""

import json

import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import CheckpointError, from_pretrained, save_pretrained, state_dict
from tests.support.checkpoints import WEIGHTLESS, assert_same, config, make


WEIGHTED = mbx.Mamba1Config(d_model=6, select_norm="weighted")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, tmp_path):
    model = make(config(WEIGHTLESS, padded_vocab_size=16), dtype)
    save_pretrained(model, tmp_path)
    assert_same(from_pretrained(tmp_path), model)
    mamba = state_dict(make(config(mbx.Mamba1Config(d_model=6), padded_vocab_size=16), dtype))
    for name, tensor in state_dict(model).items():
        assert np.array_equal(mamba.pop(name), tensor)
    assert not mamba


def test_the_published_config(tmp_path):
    """Sizes apart: `expand` contradicts `intermediate_size`, and the norms' eps is not said."""
    want = config(
        mbx.Mamba1Config(d_model=6, d_inner=12, dt_rank=4, select_norm="weightless"),
        tie_embeddings=False,
    )
    save_pretrained(make(want), tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert fields["model_type"] == "falcon_mamba"
    assert fields.pop("mixer_rms_eps") == 1e-6
    fields |= {
        "architectures": ["FalconMambaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 11,
        "expand": 16,
        "initializer_range": 0.1,
        "pad_token_id": 11,
        "rescale_prenorm_residual": False,
        "time_step_floor": 0.0001,
        "time_step_init_scheme": "random",
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_scale": 1.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "use_falcon_mambapy": False,
    }
    file.write_text(json.dumps(fields))
    assert_same(from_pretrained(tmp_path), make(want))


def test_the_kind_of_norm_is_not_lost(tmp_path):
    """A layout that would drop the norms refuses the model."""
    for layout, mixer in [
        ("transformers", WEIGHTED),
        ("state-spaces", WEIGHTED),
        ("state-spaces", WEIGHTLESS),
    ]:
        with pytest.raises(CheckpointError, match=f"select_norm='{mixer.select_norm}'"):
            save_pretrained(make(config(mixer)), tmp_path / "new", layout=layout)
    save_pretrained(make(config(WEIGHTLESS)), tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for value in (0, -1e-6, "1e-6"):
        file.write_text(json.dumps(fields | {"mixer_rms_eps": value}))
        with pytest.raises(CheckpointError, match="`mixer_rms_eps`"):
            from_pretrained(tmp_path)
    file.write_text(json.dumps(fields | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"unknown meaning.*'mixer_rms_eps'"):
        from_pretrained(tmp_path)
