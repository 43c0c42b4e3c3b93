"""LoRA changes the layers that are named, and shares its files with PEFT."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from mamba_eqx.training import LoRA, LoRAPair, load_lora, save_lora
from tests.support.cases import quick
from tests.support.lora import MAMBA, TOKENS, VOCAB, WEIGHTS, logits, make, noisy


pytestmark = pytest.mark.usefixtures("compile_fast")

# Like transformers' Jamba: fewer key and value heads, and an MLP in every layer.
JAMBA = mbx.LanguageModelConfig(
    VOCAB,
    (
        mbx.BlockConfig(
            mbx.Mamba1Config(8, d_state=4, select_norm="weighted"),
            mlp=mbx.GatedMLPConfig(6),
            norm_eps=1e-6,
        ),
        mbx.BlockConfig(
            mbx.AttentionConfig(8, nheads=2, nheads_kv=1), mlp=mbx.GatedMLPConfig(6), norm_eps=1e-6
        ),
    ),
    tie_embeddings=False,
    norm_eps=1e-6,
)
NAMES = {
    "mamba1": (MAMBA.mixer, {"in_proj", "x_proj", "dt_proj", "out_proj"}),
    "mamba2": (mbx.Mamba2Config(8, d_state=4, headdim=4), {"in_proj", "out_proj"}),
    "mamba3": (mbx.Mamba3Config(8, d_state=4, headdim=4), {"in_proj", "out_proj"}),
    "attention": (mbx.AttentionConfig(8, nheads=2), {"in_proj", "out_proj"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stacked", "dtype"),
    [
        ("mamba1", False, "float32"),
        ("mamba1", True, "bfloat16"),
        ("mamba2", False, "bfloat16"),
        ("mamba3", True, "float32"),
        ("attention", False, "float32"),
    ],
)
def test_changes_every_linear_layer_and_nothing_else(kind, stacked, dtype):
    mixer, names = NAMES[kind]
    block = mbx.BlockConfig(mixer, mlp=mbx.GatedMLPConfig(6))
    model = mbx.cast(make(stacked=stacked, layers=(block,) * 2), jnp.dtype(dtype))
    lora = LoRA.init(model, rank=3, alpha=6, key=jr.key(2))
    within = {f"mixer.{name}" for name in names} | {"mlp.fc1", "mlp.fc2"}
    prefixes = ["layers.layers"] if stacked else ["layers.layers.0", "layers.layers.1"]
    assert lora.pairs.keys() == {f"{p}.{n}" for p in prefixes for n in within} | {"lm_head"}
    assert lora.scale == 2
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lora)} == {"float32"}
    assert eqx.tree_equal(lora.merge(model), model)  # It starts equal to the model.

    lora = noisy(lora)
    before = jax.tree.leaves_with_path(model)
    for (path, old), new in zip(before, jax.tree.leaves(lora.merge(model)), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        pair = lora.pairs.get(name.removesuffix(".weight"))
        if pair is None:
            assert eqx.tree_equal(old, new)
        else:
            want = np.asarray(old, np.float32) + 2 * np.asarray(pair.b) @ np.asarray(pair.a)
            assert new.dtype == old.dtype
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            np.testing.assert_allclose(np.asarray(new, np.float32), want, atol=tolerance)


@pytest.mark.slow
def test_adapts_any_equinox_model():
    """`equinox.nn.Linear` is found alone, in attention, and in an ensemble."""
    keys = jr.split(jr.key(0), 5)
    model = {
        "encoder": eqx.nn.Linear(3, 8, key=keys[0]),
        "block": mbx.Block(mbx.Mamba1(8, key=keys[1])),
        "attention": eqx.nn.MultiheadAttention(2, 8, key=keys[2]),
        "heads": eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 2, key=key))(jr.split(keys[3], 4)),
    }
    lora = noisy(LoRA.init(model, rank=2, targets=lambda path: "block" not in path, key=keys[4]))
    attention = {f"attention.{name}_proj" for name in ("query", "key", "value", "output")}
    assert lora.pairs.keys() == {"encoder", "heads"} | attention
    assert lora.pairs["heads"].b.shape == (4, 2, 2)
    merged = lora.merge(model)
    x = jr.normal(jr.key(1), (3,))
    pair = lora.pairs["encoder"]
    want = model["encoder"](x) + pair.b @ (pair.a @ x)
    np.testing.assert_allclose(merged["encoder"](x), want, atol=1e-5)
    assert eqx.tree_equal(merged["block"], model["block"])
    assert not jnp.allclose(merged["heads"].weight, model["heads"].weight)


@pytest.mark.slow
def test_training_lowers_the_loss():
    """The model is stored in bfloat16 and cast inside the loss."""
    model = mbx.cast(make(), jnp.bfloat16)
    lora: Any = LoRA.init(model, rank=2, key=jr.key(1))
    optimiser = optax.adam(0.03)

    @quick
    def step(lora, opt_state, model):
        def loss(lora):
            merged = lora.merge(mbx.cast(model, jnp.float32))
            out = merged(TOKENS[:-1])
            return optax.softmax_cross_entropy_with_integer_labels(out, TOKENS[1:]).mean()

        value, grads = jax.value_and_grad(loss)(lora)
        updates, opt_state = optimiser.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    opt_state = optimiser.init(lora)  # pyright: ignore[reportArgumentType]
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax relies on promotion.
        for _ in range(60):
            lora, opt_state, value = step(lora, opt_state, model)
            losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert all(bool(jnp.any(pair.b != 0)) for pair in lora.pairs.values())
    assert eqx.tree_equal(model, mbx.cast(make(), jnp.bfloat16))


def test_targets_select_linear_layers():
    model = make()

    def chosen(targets):
        return set(LoRA.init(model, rank=1, targets=targets, key=jr.key(0)).pairs)

    both = {f"layers.layers.{i}.mixer.in_proj" for i in range(2)}
    assert chosen(["in_proj"]) == both
    assert chosen(["0.mixer.in_proj", "lm_head"]) == {"layers.layers.0.mixer.in_proj", "lm_head"}
    assert chosen(lambda path: path.endswith("in_proj")) == both
    for targets, message in [
        (["in_proj", "proj"], "must be the end of .* path, but got 'proj'"),
        ("in_proj", "a list of names, but got 'in_proj'"),
        (lambda path: False, "selects none. The model has layers.layers.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen(targets)


def test_invalid_arguments_raise(as_users_run):
    model = make()
    with pytest.raises(ValueError, match="rank"):
        LoRA.init(model, rank=0, key=jr.key(0))
    with pytest.raises(ValueError, match="`alpha` must be positive, but got alpha=0"):
        LoRA.init(model, rank=1, alpha=0, key=jr.key(0))
    lora = LoRA.init(model, rank=2, key=jr.key(0))
    with pytest.raises(ValueError, match=r"has none at layers\.layers\.0\.mixer\.dt_proj"):
        lora.merge(make(stacked=True))
    wide = make(layers=(mbx.BlockConfig(mbx.Mamba1Config(16, d_state=4)),) * 2)
    with pytest.raises(ValueError, match=r"must have the shape \(32, 8\) .* has shape \(64, 16\)"):
        lora.merge(wide)


@pytest.mark.slow
def test_file_loads_into_stacked_and_unrolled_models(tmp_path):
    layout = "state-spaces"
    one, other = make(), make(stacked=True)
    lora = noisy(LoRA.init(one, rank=2, alpha=3, key=jr.key(1)))
    save_lora(lora, one, tmp_path, layout=layout, base_model="of/mine")
    assert eqx.tree_equal(load_lora(tmp_path, one, layout=layout), lora)
    stacked = load_lora(tmp_path, other, layout=layout)
    assert stacked.pairs["layers.layers.mixer.in_proj"].a.shape == (2, 2, 8)
    np.testing.assert_allclose(logits(other, stacked), logits(one, lora), atol=1e-4)
    save_lora(stacked, other, tmp_path / "again", layout=layout)
    assert eqx.tree_equal(load_lora(tmp_path / "again", one, layout=layout), lora)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "of/mine"
    assert (config["r"], config["lora_alpha"]) == (2, 3)


def test_different_layers_do_not_stack(tmp_path):
    model = make()
    lora = LoRA.init(model, rank=2, targets=["0.mixer.in_proj"], key=jr.key(1))
    save_lora(lora, model, tmp_path)
    with pytest.raises(mbx.CheckpointError, match=r"mixer.in_proj .* layers \[0\]"):
        load_lora(tmp_path, make(stacked=True))


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_other_adapters_are_refused(tmp_path):
    model = make()
    save_lora(noisy(LoRA.init(model, rank=2, key=jr.key(1))), model, tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    for fields, message in [
        ({"use_dora": True}, "unknown meaning.*use_dora"),
        ({"rank_pattern": {"in_proj": 4}}, "unknown meaning.*rank_pattern"),
        ({"bias": "all"}, "`bias` of adapter_config.json must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 3}, r"in_proj.lora_A.weight has shape \(2, 8\) instead of \(3, 8\)"),
    ]:
        edit(tmp_path, **fields)
        with pytest.raises(mbx.CheckpointError, match=message):
            load_lora(tmp_path, model)
        (tmp_path / "adapter_config.json").write_text(text)
    edit(tmp_path, use_rslora=True, rank_pattern={}, layer_replication=None)
    assert load_lora(tmp_path, model).scale == pytest.approx(2 / 2**0.5)
    with pytest.raises(mbx.CheckpointError, match=r"lm_head.lora_A.weight' is unexpected"):
        load_lora(tmp_path, make(tied=True))
    # A name has one byte changed; the message is fit for a terminal.
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes().replace(b"lm_head.lora_A", b"lm_head.lora\x7fA"))
    with pytest.raises(mbx.CheckpointError, match=r"lora\\x7fA.weight' is unexpected") as error:
        load_lora(tmp_path, model)
    assert str(error.value).isprintable()


@pytest.mark.slow
def test_joins_projections_that_are_several_in_the_file(tmp_path):
    """One pair is saved as three; three that differ are joined into one; one may be missing."""
    from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors

    model = JAMBA.build(key=jr.key(0))
    lora = noisy(LoRA.init(model, rank=2, key=jr.key(1)))
    save_lora(lora, model, tmp_path)
    save_lora(lora, model, tmp_path / "adapter")
    assert eqx.tree_equal(load_lora(tmp_path, model), lora)

    stored = open_safetensors(tmp_path / WEIGHTS)
    attention = "base_model.model.model.layers.1.self_attn"
    old = lora.pairs["layers.layers.1.mixer.in_proj"]
    change = np.asarray(old.b @ old.a) * np.repeat([2, 0, 1], [8, 4, 4])[:, None]
    tensors, joined = {}, lora
    for which in "BA":  # The two remaining pairs have the same A, then different ones.
        tensors = {name: np.array(tensor.read()) for name, tensor in stored.items()}
        tensors[f"{attention}.q_proj.lora_{which}.weight"] *= 2
        for part in "AB":
            del tensors[f"{attention}.k_proj.lora_{part}.weight"]
        write_safetensors(tmp_path / "adapter" / WEIGHTS, tensors, {"format": "pt"})
        joined = load_lora(tmp_path / "adapter", model)
        pair = joined.pairs["layers.layers.1.mixer.in_proj"]
        assert pair.a.shape == (4, 8)
        np.testing.assert_allclose(pair.b @ pair.a, change, atol=1e-5)
    # The joined pair is saved with the others padded to its rank.
    save_lora(joined, model, tmp_path / "again")
    again = load_lora(tmp_path / "again", model)
    np.testing.assert_allclose(logits(model, again), logits(model, joined), atol=1e-4)

    del tensors[f"{attention}.v_proj.lora_B.weight"]
    write_safetensors(tmp_path / WEIGHTS, tensors, {"format": "pt"})
    with pytest.raises(mbx.CheckpointError, match=r"v_proj.lora_B.weight is missing"):
        load_lora(tmp_path, model)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # Warnings of third-party packages.
def test_peft_parity(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = make()
    mbx.save_pretrained(model, tmp_path / "base")
    # PEFT refuses `out_proj`. Its change of `dt_proj` has no effect until it is merged, because
    # transformers reads that weight directly.
    targets = ["in_proj", "x_proj", "dt_proj", "lm_head"]
    lora = noisy(LoRA.init(model, rank=2, alpha=3, targets=targets, key=jr.key(1)))
    save_lora(lora, model, tmp_path / "ours", base_model=str(tmp_path / "base"))

    def theirs():
        return transformers.MambaForCausalLM.from_pretrained(tmp_path / "base")

    def run(of):
        with torch.no_grad():
            return of(torch.tensor(np.asarray(TOKENS))[None].long(), use_cache=False).logits[0]

    wrapped = peft.PeftModel.from_pretrained(theirs(), str(tmp_path / "ours"))
    got = run(wrapped.merge_and_unload()).numpy()
    assert np.abs(got - np.asarray(logits(model))).max() > 0.1
    np.testing.assert_allclose(got, logits(model, lora), atol=1e-4)

    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=targets[:2], init_lora_weights=False
    )
    torch.manual_seed(0)
    other = peft.get_peft_model(theirs(), config)
    other.save_pretrained(str(tmp_path / "theirs"))
    read = load_lora(tmp_path / "theirs", model)
    assert len(read.pairs) == 4
    assert all(isinstance(pair, LoRAPair) for pair in read.pairs.values())
    np.testing.assert_allclose(run(other).numpy(), logits(model, read), atol=1e-4)
