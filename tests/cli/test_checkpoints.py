"""`mamba-eqx inspect` and `convert`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats._safetensors import open_safetensors, write_safetensors
from mamba_eqx.pretrained import Description, from_pretrained, save_pretrained
from tests.support.checkpoints import BOTH, FAMILIES, assert_same, config, make
from tests.support.commands import call
from tests.support.hub_server import Fault
from tests.support.torch_attacks import ARCHIVES


MAMBA2 = config(mbx.Mamba2Config(d_model=8, headdim=4, d_state=3), tie_embeddings=False)


@pytest.fixture
def run(capsys):
    def run_command(*args):
        code = call(*args)
        out, err = capsys.readouterr()
        return code, out, err

    return run_command


def fails(run, *args):
    """Checks that the command fails with one line on standard error, and returns that line."""
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("mamba-eqx: error: ")
    assert len(err) < 2000
    return err


# inspect


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_inspect_describes_the_model(name, layout, dtype, run, tmp_path):
    model = make({"mamba1": config(padded_vocab_size=16), "mamba2": MAMBA2}[name], dtype)
    save_pretrained(model, tmp_path, layout=layout)
    code, out, err = run("inspect", tmp_path, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    leaves = jax.tree.leaves(model)
    assert found["layout"] == layout
    assert found["parameters"]["total"] == sum(leaf.size for leaf in leaves)
    assert found["parameters"]["embedding"] == model.embedding.weight.size
    assert ("lm_head" in found["parameters"]) == (model.lm_head is not None)
    assert found["weight_bytes"] == sum(leaf.nbytes for leaf in leaves)
    state = jax.tree.leaves(model.init_state())
    assert found["state_bytes"] == sum(leaf.nbytes for leaf in state)
    assert found["state_bytes_per_token"] == 0
    assert found["dtypes"] == {
        dtype: sum(leaf.size for leaf in leaves if leaf.dtype == jnp.dtype(dtype)),
        "float32": sum(leaf.size for leaf in leaves if leaf.dtype == jnp.float32),
    }
    read = mbx.LanguageModelConfig.from_json(json.dumps(found["config"]))
    assert read == mbx.LanguageModelConfig.of(model)

    code, text, err = run("inspect", tmp_path)
    assert (code, err) == (0, "")
    total = found["parameters"]["total"]
    for words in (str(tmp_path), layout, f"2 x {name} (", f"{total:,}", dtype, "d_state=3"):
        assert words in text
    assert ("padded to 16" in text) == (name == "mamba1")
    assert ("separate head" in text) == (name == "mamba2")


def test_descriptions_show_the_mlp():
    for bias, want in ((True, {"bias": True}), (False, {})):
        mlp = mbx.GatedMLPConfig(12, bias=bias)
        block = mbx.BlockConfig(mbx.Mamba1Config(8), mlp=mlp, residual_multiplier=0.5)
        model = mbx.LanguageModelConfig(16, (block,) * 2)
        ((count, fields),) = Description("", "", model, {}, 0, {}, 0, 0, 0).blocks
        assert count == 2
        assert fields["mlp"] == {"kind": "gated_mlp", "d_intermediate": 12} | want
        assert fields["residual_multiplier"] == 0.5


def test_inspect_counts_the_experts_of_a_token(run, tmp_path):
    """A token has 3 of 5 experts in each of two layers."""
    model = make(FAMILIES["hybrid"]["transformers"]["jamba_experts"])
    save_pretrained(model, tmp_path)
    is_mixture = lambda node: isinstance(node, mbx.MixtureOfExperts)
    mixtures = [node for node in jax.tree.leaves(model, is_leaf=is_mixture) if is_mixture(node)]
    assert len(mixtures) == 2
    experts = sum(mixture.fc1.size + mixture.fc2.size for mixture in mixtures)
    active = sum(leaf.size for leaf in jax.tree.leaves(model)) - experts * 2 // 5
    assert json.loads(run("inspect", tmp_path, "--json")[1])["active_parameters"] == active
    assert f"\nactive      {active:,} parameters for each token\n" in run("inspect", tmp_path)[1]
    save_pretrained(make(BOTH["tied"]), tmp_path / "dense")
    assert "\nactive" not in run("inspect", tmp_path / "dense")[1]


def test_inspect_reads_no_tensor_values(run, tmp_path, monkeypatch):
    save_pretrained(make(BOTH["tied"]), tmp_path)
    monkeypatch.setattr(
        "mamba_eqx.formats._safetensors.read_array",
        lambda *_, **__: pytest.fail("a tensor was read"),
    )
    assert run("inspect", tmp_path)[0] == 0


def test_inspect_accepts_float64(run, tmp_path):
    with jax.enable_x64(True):
        save_pretrained(make(BOTH["tied"], "float64"), tmp_path)
    code, out, _ = run("inspect", tmp_path, "--json")
    assert code == 0
    assert {*json.loads(out)["dtypes"]} == {"float64"}


def test_inspect_lists_unexpected_tensors(run, tmp_path):
    save_pretrained(make(BOTH["tied"]), tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = {name: tensor.read() for name, tensor in open_safetensors(file).items()}
    write_safetensors(file, arrays | {"x": np.zeros(2)}, {})
    assert "1 unexpected: 'x'" in fails(run, "inspect", tmp_path)


@pytest.mark.usefixtures("as_users_run")
def test_errors_for_hostile_files_are_one_line(run, tmp_path):
    save_pretrained(make(BOTH["tied"]), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, (data, _) in ARCHIVES.items():
        (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        assert "pytorch_model.bin" in fails(run, "inspect", tmp_path), name


def test_inspect_without_a_checkpoint_fails(run, tmp_path):
    assert "There is no folder" in fails(run, "inspect", tmp_path / "gone")
    assert "has no config.json" in fails(run, "inspect", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "must be a JSON object" in fails(run, "inspect", tmp_path)


@pytest.mark.parametrize("max_shard_size", ["5GB", 700])
def test_inspect_and_convert_from_the_hub(max_shard_size, hub, run, tmp_path, monkeypatch):
    save_pretrained(make(BOTH["tied"]), tmp_path / "there", max_shard_size=max_shard_size)
    hub.add("me/mine", {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()})
    options = ("--endpoint", hub.endpoint, "--cache-dir", tmp_path / "cache")
    monkeypatch.setattr("mamba_eqx.pretrained._hub._FIRST_READ", 50)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    code, out, _ = run("inspect", "me/mine", *options)
    assert code == 0
    assert "the repository 'me/mine'" in out.lower()
    # Only the headers were requested.
    weights = [r for r in hub.requests if r.server == "storage"]
    assert weights
    assert all("range" in r.headers for r in weights)
    assert not [*(tmp_path / "cache").glob("*/snapshots/*/*.safetensors")]
    assert {r.headers.get("authorization") for r in weights} == {None}

    assert run("convert", "me/mine", tmp_path / "here", *options)[0] == 0
    assert_same(from_pretrained(tmp_path / "here"), make(BOTH["tied"]))
    hub.requests.clear()
    assert run("inspect", "me/mine", *options)[:2] == (0, out)
    assert not [r for r in hub.requests if r.server == "storage"]
    hub.requests.clear()
    code, cached, _ = run("inspect", "me/mine", *options, "--local-files-only")
    assert code == 0
    assert "the cached part of the repository" in cached.lower()
    assert cached.splitlines()[1:] == out.splitlines()[1:]
    assert hub.requests == []


def test_hub_failures_are_reported(hub, run, tmp_path):
    save_pretrained(make(BOTH["tied"]), tmp_path / "there")
    files = {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()}
    repository = hub.add("me/mine", files)
    options = ("--endpoint", hub.endpoint, "--cache-dir", tmp_path / "cache")
    error = fails(run, "inspect", "me/mine", *options, "--revision", "v9")
    assert "at revision 'v9' on the Hugging Face Hub" in error
    assert "does not exist" in fails(run, "inspect", "me/other", *options)
    hub.faults.append(Fault("GET /large", times=99, status=503))
    assert "status 503" in fails(run, "inspect", "me/mine", *options)
    hub.faults.clear()
    for data in (b"", b"<!doctype html>", files["model.safetensors"][:100], b"\xff" * 2000):
        repository.commit(files | {"model.safetensors": data})
        assert "model.safetensors: " in fails(run, "inspect", "me/mine", *options)
    del files["model.safetensors"]
    repository.commit(files)
    assert "has no weights" in fails(run, "inspect", "me/mine", *options)


# convert


@pytest.mark.parametrize("model", [BOTH["tied"], BOTH["untied"], MAMBA2], ids=["1", "2", "mamba2"])
def test_convert_between_all_layouts(model, run, tmp_path):
    model = make(model)
    save_pretrained(model, tmp_path / "0")
    route = ["state-spaces", "state-spaces", "transformers", "transformers"]
    for i, layout in enumerate(route):
        source, dest = tmp_path / str(i), tmp_path / str(i + 1)
        code, out, err = run("convert", source, dest, "--layout", layout)
        assert (code, err) == (0, "")
        assert f"({layout} layout, " in out
        assert_same(from_pretrained(dest), model)
        values = json.loads((dest / "config.json").read_text())
        assert ("model_type" in values) == (layout == "transformers")
    first, last = (
        {p.name: p.read_bytes() for p in (tmp_path / i).iterdir() if p.name != "README.md"}
        for i in "04"
    )
    assert first == last


def test_convert_to_another_dtype_and_shards(run, tmp_path):
    model = make(BOTH["tied"])
    save_pretrained(model, tmp_path / "a")
    options = ("--dtype", "bfloat16", "--max-shard-size", "0.5KB")
    assert run("convert", tmp_path / "a", tmp_path / "b", *options)[0] == 0
    assert_same(from_pretrained(tmp_path / "b"), mbx.cast(model, jnp.bfloat16))
    assert len([*(tmp_path / "b").glob("model-*")]) > 2


def test_convert_overwrites_only_on_request(run, tmp_path):
    old, new = make(BOTH["tied"]), make(BOTH["untied"])
    save_pretrained(old, tmp_path / "old")
    save_pretrained(new, tmp_path / "new")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    error = fails(run, "convert", tmp_path / "new", tmp_path / "old")
    assert "not empty. Give another folder, or --overwrite" in error
    assert_same(from_pretrained(tmp_path / "old"), old)
    assert run("convert", tmp_path / "new", tmp_path / "old", "--overwrite")[0] == 0
    assert_same(from_pretrained(tmp_path / "old"), new)
    assert (tmp_path / "old" / "tokenizer.json").exists()
    # A checkpoint can replace itself.
    where = tmp_path / "new"
    assert run("convert", where, where, "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert_same(from_pretrained(where), mbx.cast(new, jnp.bfloat16))


def test_failed_convert_writes_nothing(run, tmp_path):
    save_pretrained(make(config(d_intermediate=128)), tmp_path / "mlp", layout="state-spaces")
    assert "MLPs, experts or attention beside Mamba-1" in fails(
        run, "convert", tmp_path / "mlp", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    options = ("--layout", "state-spaces")
    assert "is a file" in fails(run, "convert", tmp_path / "mlp", tmp_path / "file", *options)
    shutil.copytree(tmp_path / "mlp", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"")
    assert "empty" in fails(run, "convert", tmp_path / "damaged", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_convert_refuses_invalid_options(run, tmp_path):
    save_pretrained(make(BOTH["tied"]), tmp_path / "a")
    code, _, err = run("convert", tmp_path / "a", tmp_path / "b", "--max-shard-size", "many")
    assert code == 2
    assert "such as '5GB'" in err
    for option in (("--layout", "onnx"), ("--dtype", "int8")):
        assert run("convert", tmp_path / "a", tmp_path / "b", *option)[0] == 2
    assert not (tmp_path / "b").exists()
