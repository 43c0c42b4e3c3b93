"""What `from_pretrained` and its siblings refuse, and that they do so before anything is loaded."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.pretrained import (
    CheckpointError,
    _load,
    from_pretrained,
    load_state_dict,
    save_pretrained,
    state_dict,
)
from tests.support.bounded import bounded
from tests.support.checkpoints import BOTH, config, make


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model in either layout, its config and tensors altered."""

    def save(layout="transformers", *, model=BOTH["tied"], fields=None, tensors=None, drop=()):
        folder = tmp_path / "checkpoint"
        save_pretrained(make(model), folder, layout=layout)
        if fields is not None:
            values = json.loads((folder / "config.json").read_text()) | fields
            values = {k: v for k, v in values.items() if v is not DROPPED}
            (folder / "config.json").write_text(json.dumps(values))
        file = folder / "model.safetensors"
        arrays = {name: tensor.read() for name, tensor in open_safetensors(file).items()}
        arrays = {k: v for k, v in (arrays | (tensors or {})).items() if k not in drop}
        write_safetensors(file, arrays, {"format": "pt"})
        return folder

    return save


DROPPED = object()
EMBEDDING = "backbone.embeddings.weight"
NORM = "backbone.norm_f.weight"


@pytest.fixture
def nothing_loaded(monkeypatch):
    def refuse(*_):
        pytest.fail("an array was made before all was checked")

    monkeypatch.setattr(_load, "to_jax", refuse)


# Tensors.


@pytest.mark.usefixtures("nothing_loaded")
def test_all_faults_are_listed_at_once(saved):
    folder = saved(
        drop=["backbone.layers.1.mixer.D"],
        tensors={
            NORM: np.zeros(7, np.float32),
            "backbone.layers.0.mixer.A_log": np.zeros((9, 3), np.int32),
            "backbone.layers.2.mixer.D": np.zeros(9, np.float32),
        },
    )
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    for part in (
        str(folder),
        "1 missing: backbone.layers.1.mixer.D",
        "1 unexpected: 'backbone.layers.2.mixer.D'",
        "1 of another shape: backbone.norm_f.weight is (7,) and should be (6,)",
        "1 not of a floating-point dtype: 'backbone.layers.0.mixer.A_log' is int32",
    ):
        assert part in str(error.value)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("transformers", {"conv": (9, 5)}, r"conv1d.weight is \(9, 5\) and should be \(9, 1, 5\)"),
        ("transformers", {"conv": (5, 1, 9)}, r"should be \(9, 1, 5\)"),
        ("transformers", {"lm_head.weight": (9, 6)}, r"lm_head.weight is \(9, 6\)"),
        ("state-spaces", {"lm_head.weight": (16, 6)}, "lm_head.weight differs from backbone.emb"),
        ("transformers", {"backbone.embedding.weight": (16, 6)}, "1 unexpected"),
    ],
)
def test_shape_is_never_guessed(layout, change, message, saved):
    name, shape = change.popitem() if len(change) > 1 else next(iter(change.items()))
    name = "backbone.layers.0.mixer.conv1d.weight" if name == "conv" else name
    folder = saved(layout, tensors={name: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_square_matrices_are_not_transposed(saved):
    square = mbx.Mamba1Config(d_model=6, d_inner=6, dt_rank=6, d_conv=6)
    folder = saved(model=config(square))
    assert eqx.tree_equal(from_pretrained(folder), make(config(square)))


def test_a_tied_head_may_be_there_twice_if_it_is_the_same(saved):
    folder = saved("transformers")
    embedding = open_safetensors(folder / "model.safetensors")[EMBEDDING].read()
    same = saved(tensors={"lm_head.weight": np.array(embedding)})
    assert eqx.tree_equal(from_pretrained(same), make(BOTH["tied"]))
    other = saved(tensors={"lm_head.weight": embedding.astype(np.float16)})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        from_pretrained(other)
    nan = np.array(embedding)
    nan[0] = np.nan
    from_pretrained(saved(tensors={EMBEDDING: nan, "lm_head.weight": nan.copy()}))


def test_the_older_name_of_the_embedding(saved):
    folder = saved()
    embedding = open_safetensors(folder / "model.safetensors")[EMBEDDING].read()
    folder = saved(tensors={"backbone.embedding.weight": np.array(embedding)}, drop=[EMBEDDING])
    assert eqx.tree_equal(from_pretrained(folder), make(BOTH["tied"]))


def test_untied_needs_its_head(saved):
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        from_pretrained(saved(model=BOTH["untied"], drop=["lm_head.weight"]))


# Configs.


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("transformers", {"hidden_act": "gelu"}, "`hidden_act`.*must be 'silu', but is 'gelu'"),
        ("transformers", {"model_type": "mamba3"}, "`model_type`.*'mamba2'.*but is 'mamba3'"),
        ("transformers", {"model_type": None}, "`model_type`.*but is None"),
        (
            "transformers",
            {"quantization_config": {}},
            "`quantization_config`.*quantised checkpoints are not read",
        ),
        ("transformers", {"use_bias": 0}, "`use_bias`.*true or false, but is 0"),
        ("transformers", {"state_size": 3.0}, "`state_size`.*integer.*but is 3.0"),
        ("transformers", {"state_size": True}, "`state_size`.*integer.*but is True"),
        ("transformers", {"state_size": 0}, "`state_size`.*integer.*but is 0"),
        ("transformers", {"hidden_size": float("inf")}, "`hidden_size`.*but is inf"),
        ("transformers", {"hidden_size": {"__float__": "Infinity"}}, "`hidden_size`.*but is inf"),
        ("transformers", {"hidden_size": {"__float__": "7"}}, "`hidden_size` is not a number"),
        ("transformers", {"layer_norm_epsilon": float("inf")}, "`layer_norm_epsilon`.*inf"),
        ("transformers", {"layer_norm_epsilon": 1.5}, "`norm_eps`.*1.5"),
        ("transformers", {"layer_norm_epsilon": float("nan")}, "`layer_norm_epsilon` is NaN"),
        ("transformers", {"time_step_max": {"__float__": "NaN"}}, "`time_step_max` is NaN"),
        ("transformers", {"id2label": {"a": [1, float("nan")]}}, r"`id2label.a\[1\]` is NaN"),
        ("transformers", {"time_step_rank": "all"}, "`time_step_rank`.*integer.*'all'"),
        ("transformers", {"unpadded_vocab_size": 17}, "`padded_vocab_size` must be at least"),
        (
            "state-spaces",
            {"ssm_cfg": {"layer": "Mamba4"}},
            "`layer` of `ssm_cfg`.*must be 'Mamba1' or 'Mamba2'",
        ),
        ("state-spaces", {"ssm_cfg": {"headdim": 64}}, "`ssm_cfg` has fields.*'headdim'"),
        ("state-spaces", {"ssm_cfg": []}, "`ssm_cfg` must be a JSON object"),
        ("state-spaces", {"ssm_cfg": {"expand": 1e-9}}, "`expand` of `ssm_cfg` times 6"),
        ("state-spaces", {"attn_layer_idx": [2]}, "`attn_layer_idx`.*from 0 to 1"),
        ("state-spaces", {"norm_epsilon": 1e-6}, "unknown meaning.*'norm_epsilon'"),
        ("state-spaces", {"d_model": DROPPED}, "no `d_model`, which is required"),
        ("state-spaces", {"d_intermediate": -1}, "`d_intermediate`.*from 0"),
        # The weights say otherwise.
        ("transformers", {"num_hidden_layers": 3}, "10 missing: backbone.layers.2"),
        ("transformers", {"num_hidden_layers": 1}, "10 unexpected: 'backbone.layers.1"),
        ("transformers", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ("transformers", {"intermediate_size": DROPPED, "expand": 2}, "and should be"),
        ("state-spaces", {"rms_norm": False}, "missing: backbone.layers.0.norm.bias"),
        ("state-spaces", {"d_intermediate": 100}, "mlp.fc1.weight"),
    ],
)
def test_config_is_refused(layout, fields, message, saved):
    folder = saved(layout, fields=fields)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as error:
        from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("transformers", {"num_hidden_layers": 10**12}),
        ("transformers", {"num_hidden_layers": 60_000}),
        ("transformers", {"vocab_size": 10**12}),
        ("transformers", {"hidden_size": 10**7, "intermediate_size": 10**7, "state_size": 10**7}),
        ("transformers", {"expand": 10**300, "intermediate_size": DROPPED}),
        ("state-spaces", {"n_layer": 10**12}),
        ("state-spaces", {"n_layer": 60_000}),
        ("state-spaces", {"pad_vocab_size_multiple": 2**24}),
        ("state-spaces", {"d_model": 10**4000}),
    ],
)
def test_absurd_sizes_are_refused_quickly(layout, fields, saved):
    folder = saved(layout, fields=fields)
    with bounded(), pytest.raises(CheckpointError):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a JSON object, but is \\[1\\]"),
        ("null", "must be a JSON object, but is None"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        (f'{{"a": {"9" * 5000}}}', "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_json_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_fields_that_do_not_matter_are_ignored(saved):
    official = {"d_model": 1, "n_layer": 1, "ssm_cfg": {}, "rms_norm": True, "d_inner": 1}
    more = {"fused_add_norm": True, "pad_vocab_size_multiple": 8, "torch_dtype": "float32"}
    infinite = {"time_step_max": float("inf"), "time_step_floor": {"__float__": "Infinity"}}
    folder = saved(fields=official | more | infinite | {"expand": 7, "use_cache": False})
    assert eqx.tree_equal(from_pretrained(folder), make(BOTH["tied"]))


def test_missing_fields_have_the_defaults_of_upstream(saved):
    dropped = {"time_step_rank": DROPPED, "state_size": DROPPED, "conv_kernel": DROPPED}
    default = mbx.Mamba1Config(d_model=20)
    folder = saved(model=config(default), fields=dropped | {"intermediate_size": DROPPED})
    assert eqx.tree_equal(from_pretrained(folder), make(config(default)))
    folder = saved(
        "state-spaces",
        model=config(default, padded_vocab_size=16),
        fields={"ssm_cfg": {"dt_min": 0.1}}
        | dict.fromkeys(["tie_embeddings", "d_intermediate", "attn_cfg", "rms_norm"], DROPPED),
    )
    assert eqx.tree_equal(from_pretrained(folder), make(config(default, padded_vocab_size=16)))


# Files.


def test_missing_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="no folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder"):
        from_pretrained("./nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        from_pretrained(tmp_path)
    folder = saved()
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        from_pretrained(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights: none of model\.safetensors, "):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "file",
    [
        *(
            "../model.safetensors",
            "/etc/passwd",
            "a/b.safetensors",
            "..",
            "",
            "C:\\x",
            "a\\b",
            "a\0b",
        ),
        *("x" * 300, "é" * 128),  # Longer than the names of file systems.
    ],
)
def test_shards_are_plain_names(file, saved):
    _check_index(saved(), {NORM: file}, "not the plain name of a file")


def test_links_do_not_leave_the_folder(saved, tmp_path):
    folder = saved()
    outside = tmp_path / "outside.safetensors"
    write_safetensors(outside, {NORM: np.zeros(6, np.float32)}, {})
    (folder / "shard.safetensors").symlink_to(outside)
    _check_index(folder, {NORM: "shard.safetensors"}, "a link that leaves the folder")
    for name in ("config.json", "model.safetensors"):
        folder = saved()
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(f"../{name}")
        with pytest.raises(CheckpointError, match=rf"{name} is a link that leaves the folder"):
            from_pretrained(folder)
        (folder / name).unlink()
    # Within it they may be, and the folder itself may be one.
    folder = saved()
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert eqx.tree_equal(from_pretrained(tmp_path / "link"), make(BOTH["tied"]))


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_of_the_hub_are_made_of_links(shared, saved, tmp_path):
    """Into a folder beside and, for what came by its newer protocol, from there on into another."""
    repository = tmp_path / "models--me--mine"
    snapshot, blobs, store = repository / "snapshots" / "a1b2", repository / "blobs", "blobs/0f"
    for folder in (snapshot, blobs, tmp_path / store):
        folder.mkdir(parents=True)
    for file in saved().iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/of-{file.name}")
        if shared:
            (blobs / f"of-{file.name}").symlink_to(f"../../{store}/{file.name}")
            file.rename(tmp_path / store / file.name)
        else:
            file.rename(blobs / f"of-{file.name}")
    assert eqx.tree_equal(from_pretrained(snapshot), make(BOTH["tied"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no `weight_map`"),
        ({}, "no `weight_map`"),
        ({"weight_map": {}}, "no `weight_map`"),
        ({"weight_map": {NORM: 3}}, "'3', which is not the plain name"),
        ({"weight_map": {NORM: "gone.safetensors"}}, "'gone.safetensors' it refers to is missing"),
        ({"weight_map": {NORM: "one.safetensors"}}, "also holds 'extra'"),
        ({"weight_map": dict.fromkeys([NORM, "extra", "x"], "one.safetensors")}, "lacks 'x'"),
        ({"weight_map": {str(i): f"{i}" for i in range(5000)}}, "5000 files"),
    ],
)
def test_index_and_shards_agree(content, message, saved):
    folder = saved()
    one = {NORM: np.zeros(6, np.float32), "extra": np.zeros(6, np.float32)}
    write_safetensors(folder / "one.safetensors", one, {})
    _check_index(folder, content, message)


def _check_index(folder, content, message):
    if isinstance(content, dict) and content and "weight_map" not in content:
        content = {"weight_map": content}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_dtype_must_be_floating(saved):
    with pytest.raises(ValueError, match="floating-point dtype, but got int32"):
        from_pretrained(saved(), dtype=jnp.int32)


# State dicts, and what a layout cannot hold.


@pytest.mark.usefixtures("as_users_run")
def test_state_dict_refuses():
    model = make(BOTH["tied"])
    tensors = state_dict(model)
    with pytest.raises(CheckpointError, match="got tuple"):
        state_dict((model,))  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        CheckpointError, match=r"embeddings.weight must be an array, but is of type"
    ):
        state_dict(eqx.filter_eval_shape(lambda: model))
    with pytest.raises(CheckpointError, match=r"norm_f.weight must be an array, but .* type float"):
        load_state_dict(model, tensors | {NORM: 1.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match=r"1 missing: backbone.norm_f.weight"):
        load_state_dict(model, {k: v for k, v in tensors.items() if k != NORM})
    with pytest.raises(CheckpointError, match=r"1 unexpected: 'x'"):
        load_state_dict(model, tensors | {"x": tensors[NORM]})
    with pytest.raises(CheckpointError, match=r"norm_f.weight is \(7,\) and should be \(6,\)"):
        load_state_dict(model, tensors | {NORM: jnp.zeros(7)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs"):
        load_state_dict(model, tensors | {"lm_head.weight": jnp.zeros((16, 6))})
    with pytest.raises(CheckpointError, match="`layout` must be one of"):
        load_state_dict(model, tensors, layout="x")
