"""Models that a layout cannot store, and what the errors say."""

import dataclasses

import equinox as eqx
import pytest

import mamba_eqx as mbx
from mamba_eqx.pretrained import (
    CheckpointError,
    from_pretrained,
    layouts_for,
    save_pretrained,
    state_dict,
)
from mamba_eqx.pretrained.layouts import LAYOUTS
from tests.support.checkpoints import (
    BIASED,
    EXPERTS,
    GATED,
    GRANITE_EXPERTS,
    NORMALISED,
    ODD,
    OFFICIAL,
    ROTARY,
    WEIGHTLESS,
    WHOLE,
    attention,
    config,
    falcon_h1,
    granite,
    hybrid,
    make,
    mamba2,
    mamba3,
    nemotron_h,
)


pytestmark = pytest.mark.usefixtures("compile_fast")


UNGATED = mbx.MLPConfig(9)
DELTA = mbx.GatedDeltaNetConfig(d_model=6, headdim=4)
PARALLEL = mbx.ParallelConfig((mamba2(), ROTARY))

# Models that a layout cannot store: the layout, the model, what the error says, and the layout that
# it recommends, if any.
UNSTORABLE = [
    ("transformers", config(d_intermediate=128), "experts or attention beside", "state-spaces"),
    ("transformers", config(d_intermediate=12), "experts or attention beside", None),
    ("transformers", config(rms_norm=False), r"LayerNorm \(rms_norm=False\)", "state-spaces"),
    ("state-spaces", config(norm_eps=1e-6), "`norm_eps` other than 1e-05", "transformers"),
    ("state-spaces", config(d_intermediate=100), "not a multiple of 128", None),
    ("state-spaces", config(d_intermediate=12), "not a multiple of 128", None),
    (
        "transformers",
        mbx.LanguageModelConfig(13, (mbx.BlockConfig(ODD), mbx.BlockConfig(BIASED))),
        "layers that differ",
        None,
    ),
    (
        "state-spaces",
        mbx.LanguageModelConfig(13, (mbx.BlockConfig(ODD), mbx.BlockConfig(BIASED))),
        "layers that differ",
        None,
    ),
    (
        "transformers",
        mbx.LanguageModelConfig(13, (mbx.BlockConfig(ODD), mbx.BlockConfig(ODD, norm_eps=0.1))),
        r"layers that differ \(layer 0 is.*norm_eps=0\.1",
        None,
    ),
    (
        "state-spaces",
        mbx.LanguageModelConfig(13, (mbx.BlockConfig(ODD), mbx.BlockConfig(ODD, norm_eps=0.1))),
        r"layers that differ \(layer 0 is.*norm_eps=0\.1",
        None,
    ),
    (
        "transformers",
        config(mbx.Mamba1Config(d_model=6, select_norm="weighted")),
        "select_norm='weighted'",
        None,
    ),
    (
        "state-spaces",
        config(mbx.Mamba1Config(d_model=6, select_norm="weighted")),
        "select_norm='weighted'",
        None,
    ),
    ("state-spaces", config(WEIGHTLESS), "select_norm='weightless'", "transformers"),
    ("transformers", config(mamba2(D_has_hdim=True)), "D_has_hdim=True", "state-spaces"),
    ("transformers", config(mamba2(rms_norm=False)), "without a norm", "state-spaces"),
    ("transformers", config(mamba2(d_ssm=12)), "d_ssm=12 and d_inner=18", "state-spaces"),
    (
        "transformers",
        config(mamba2(norm_before_gate=True)),
        "the norm before the gate",
        "state-spaces",
    ),
    (
        "transformers",
        config(mamba2(norm_eps=1e-4)),
        "norm_eps=0.0001 in a model with norm_eps=1e-05",
        None,
    ),
    (
        "transformers",
        config(mamba2(d_inner=15, headdim=5, ngroups=3)),
        "d_inner=15 and d_model=6",
        None,
    ),
    (
        "state-spaces",
        config(mamba2(d_inner=15, headdim=5, ngroups=3)),
        "d_inner=15 and d_model=6",
        None,
    ),
    ("state-spaces", config(mamba2(norm_eps=1e-4)), "norm_eps=0.0001", None),
    ("transformers", config(mamba3()), "Mamba3 layers", "state-spaces"),
    ("state-spaces", config(mamba3(norm_eps=1e-4)), "norm_eps=0.0001", None),
    (
        "transformers",
        config(mamba2(ssm_multipliers=(1.0, 1.0, 0.5, 1.0, 1.0))),
        r"with multipliers \(ssm_multipliers=\(1.0, 1.0, 0.5, 1.0, 1.0\)",
        None,
    ),
    (
        "state-spaces",
        config(mamba2(ssm_multipliers=(1.0, 1.0, 1.0, 1.0, 2.0))),
        "with multipliers",
        None,
    ),
    ("transformers", config(PARALLEL), "layers without an MLP", None),
    ("transformers", hybrid(PARALLEL, ROTARY), r"Attention and .*Parallel layers", None),
    (
        "transformers",
        falcon_h1(mamba2(), ROTARY),
        "rotary embedding of a part of each head",
        None,
    ),
    ("transformers", falcon_h1(mamba2(d_ssm=12), WHOLE), "some channels as an MLP", None),
    ("transformers", falcon_h1(mamba2(norm_eps=1e-4), WHOLE), "norm_eps=0.0001", None),
    ("transformers", falcon_h1(mamba2(), attention(window=4)), "with a window", None),
    (
        "transformers",
        hybrid(mbx.ParallelConfig((WHOLE, mamba2()))),
        r"other than Mamba2 and Attention, in this order \(Attention, Mamba2\)",
        None,
    ),
    (
        "transformers",
        hybrid(mbx.ParallelConfig((mamba2(), mamba2(), WHOLE))),
        r"in this order \(Mamba2, Mamba2, Attention\)",
        None,
    ),
    ("state-spaces", config(PARALLEL), "Parallel layers", None),
    ("transformers", config(DELTA), "GatedDeltaNet layers", None),
    ("state-spaces", config(DELTA), "GatedDeltaNet layers", None),
    (
        "transformers",
        hybrid(mamba2(), attention(rotary_emb_dim=8, rotary_emb_interleaved=True)),
        "or with an interleaved one .*or an interleaved one",
        None,
    ),
    (
        "transformers",
        granite(mamba2(), attention(rotary_emb_dim=4)),
        "a multiplier of .*rotary embedding of a part of each head",
        None,
    ),
    (
        "transformers",
        granite(mamba2(), mlp=dataclasses.replace(GRANITE_EXPERTS, d_shared=None)),
        r"experts without a shared expert \(d_shared=None\)",
        None,
    ),
    (
        "transformers",
        granite(mamba2(), mlp=dataclasses.replace(GRANITE_EXPERTS, routing="softmax")),
        "experts with another routing .*routing='softmax'",
        None,
    ),
    (
        "transformers",
        granite(mamba2(), mlp=dataclasses.replace(GRANITE_EXPERTS, gated=False)),
        "experts without a gate",
        None,
    ),
    (
        "transformers",
        granite(mamba2(), mlp=dataclasses.replace(GRANITE_EXPERTS, d_latent=4)),
        "experts in a smaller space",
        None,
    ),
    (
        "transformers",
        mbx.LanguageModelConfig(
            13,
            (mbx.BlockConfig(mamba2(), mlp=GRANITE_EXPERTS), mbx.BlockConfig(mamba2(), mlp=GATED)),
        ),
        "experts in some of the layers only",
        None,
    ),
    ("transformers", granite(mamba2(), attention(headdim=3)), "an odd number of features", None),
    (
        "transformers",
        granite(mamba2(), attention(out_proj_bias=True)),
        "a bias in one projection only",
        None,
    ),
    ("transformers", hybrid(mamba2(), OFFICIAL), "attention with a convolution", None),
    ("transformers", hybrid(mamba2(), attention(window=4)), "attention with a window", None),
    (
        "transformers",
        hybrid(mamba2(), attention(rotary_emb_dim=4, softmax_scale=0.3)),
        "softmax_scale=0.3.*rotary embedding of a part",
        None,
    ),
    (
        "transformers",
        hybrid(mamba2(), ROTARY, attention()),
        "layers that differ within one kind",
        None,
    ),
    (
        "transformers",
        hybrid(mamba2(), ROTARY, d_intermediate=None),
        r"hybrids with a layer without an MLP \(mlp=None in layer 0\)",
        "state-spaces",
    ),
    ("transformers", hybrid(ROTARY, ROTARY), "attention alone", None),
    ("transformers", hybrid(NORMALISED, mamba2()), "Mamba1 and Mamba2 layers", None),
    ("transformers", hybrid(NORMALISED, ROTARY), "Mamba-1 with a rotary embedding", None),
    (
        "transformers",
        hybrid(NORMALISED, attention(out_proj_bias=True)),
        "attention beside Mamba-1 with biases",
        None,
    ),
    (
        "transformers",
        hybrid(NORMALISED, NORMALISED, attention(), attention()),
        r"irregular intervals \(in layers \[2, 3\]",
        None,
    ),
    (
        "transformers",
        mbx.LanguageModelConfig(
            13,
            (
                mbx.BlockConfig(
                    NORMALISED,
                    mlp=mbx.MixtureOfExpertsConfig(9, n_experts=1, top_k=1, routing="softmax"),
                ),
            ),
        ),
        r"a router with a single expert \(n_experts=1\)",
        None,
    ),
    (
        "transformers",
        nemotron_h(
            (
                mamba2(),
                mbx.MixtureOfExpertsConfig(
                    7, n_experts=1, top_k=1, routing="sigmoid", gated=False, d_shared=5
                ),
            )
        ),
        r"a router with a single expert \(n_experts=1\)",
        None,
    ),
    ("transformers", hybrid(mbx.Mamba1Config(6)), "experts or attention beside Mamba-1", None),
    ("transformers", nemotron_h((ROTARY, UNGATED)), "attention with a rotary embedding", None),
    ("transformers", nemotron_h((attention(window=4), UNGATED)), "with a window", None),
    ("transformers", nemotron_h((attention(out_proj_bias=True), UNGATED)), "with biases", None),
    (
        "transformers",
        nemotron_h((mamba2(), UNGATED), (mamba2(), mbx.MLPConfig(5))),
        "within one kind of MLP",
        None,
    ),
    (
        "transformers",
        dataclasses.replace(nemotron_h((mamba2(), UNGATED)), tie_embeddings=True),
        "models of Nemotron-H with tied embeddings",
        None,
    ),
    (
        "transformers",
        nemotron_h((mamba2(), EXPERTS), (mamba2(), mbx.MLPConfig(9, bias=True))),
        "MLPs with biases beside experts",
        None,
    ),
    (
        "transformers",
        nemotron_h((mamba2(), dataclasses.replace(EXPERTS, d_shared=None))),
        "without a shared expert",
        None,
    ),
    (
        "transformers",
        nemotron_h((mamba2(), dataclasses.replace(EXPERTS, gated=True))),
        "gated experts of Nemotron-H",
        None,
    ),
    (
        "transformers",
        nemotron_h((mamba2(), mbx.MixtureOfExpertsConfig(7, 6, 2, gated=False, d_shared=5))),
        r"another routing \(routing='softmax_of_chosen'",
        None,
    ),
    ("state-spaces", nemotron_h((mamba2(), UNGATED)), "MLPs of the kind MLP", "transformers"),
    (
        "state-spaces",
        hybrid(mamba2(), attention(window=4), d_intermediate=None),
        "a window",
        None,
    ),
    (
        "state-spaces",
        hybrid(mamba2(), ROTARY, OFFICIAL, d_intermediate=None),
        "layers that differ within one kind",
        None,
    ),
    ("state-spaces", hybrid(mamba2(), ROTARY), "not a multiple of 128", "transformers"),
    (
        "state-spaces",
        hybrid(NORMALISED, ROTARY, d_intermediate=None),
        "normalise `dt`, `B` and `C`",
        None,
    ),
    ("mistral", config(mbx.Mamba1Config(d_model=32)), r"other than.*layer 0 is", "transformers"),
    (
        "mistral",
        config(mbx.Mamba2Config(d_model=32, d_state=64)),
        r"other than.*layer 0 is",
        "transformers",
    ),
    (
        "mistral",
        config(mbx.Mamba2Config(d_model=32, d_inner=128)),
        r"other than.*layer 0 is",
        "transformers",
    ),
    (
        "mistral",
        config(mbx.Mamba2Config(d_model=64, d_ssm=64)),
        r"other than.*layer 0 is",
        "state-spaces",
    ),
    (
        "mistral",
        config(mbx.Mamba2Config(d_model=32), d_intermediate=128),
        r"other than.*layer 0 is",
        "transformers",
    ),
]


# The quick run makes every third of these models.
@pytest.mark.parametrize(
    ("layout", "model", "message", "remedy"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (i % 3 > 0))
        for i, case in enumerate(UNSTORABLE)
    ],
)
def test_unstorable_model_is_refused(layout, model, message, remedy, tmp_path):
    with pytest.raises(
        CheckpointError, match=f"{layout!r} layout cannot store.*{message}"
    ) as error:
        save_pretrained(make(model), tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()
    # The remedy works, or there is none.
    can = layouts_for(eqx.filter_eval_shape(lambda: make(model)))
    assert layout not in can
    assert next(iter(can), None) == remedy
    if remedy is None:
        assert str(error.value).endswith("No layout can store this model.")
        for other in LAYOUTS:
            with pytest.raises(CheckpointError, match="cannot store"):
                state_dict(make(model), layout=other)
    else:
        assert str(error.value).endswith(f"Use `layout={remedy!r}`.")
        save_pretrained(make(model), tmp_path / "new", layout=remedy)
        assert eqx.tree_equal(from_pretrained(tmp_path / "new"), make(model))


# Models that the layout of transformers has fields for, but with numbers that are refused on
# loading.
UNREADABLE = [
    (granite(mamba2(), logits_multiplier=1e-9), "`logits_scaling` .*at most"),
    # The reciprocal of this number is infinite.
    (granite(mamba2(), logits_multiplier=5e-324), "`logits_scaling` .*at most .*but is inf"),
    (falcon_h1(mamba2(), attention(rotary_emb_dim=8, softmax_scale=1e308)), "`key_multiplier`"),
    (
        nemotron_h((mamba2(), dataclasses.replace(EXPERTS, scaling=1e9))),
        "`routed_scaling_factor` .*at most",
    ),
    (nemotron_h((mamba2(dt_limit=(1e9, 2e9)), None)), "`time_step_limit`"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "message"), UNREADABLE)
def test_model_that_could_not_be_loaded_is_refused(model, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"could not be loaded again: {message}"):
        save_pretrained(make(model), tmp_path / "new")
    assert not (tmp_path / "new").exists()
