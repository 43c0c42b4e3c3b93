"""Checkpoints with weights of 8 and 4 bits."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.formats import open_safetensors, write_safetensors
from mamba_eqx.layers import QuantizedLinear


pytestmark = pytest.mark.usefixtures("compile_fast")

MAMBA = mbx.BlockConfig(mbx.Mamba1Config(64, d_inner=96))
# Attention in transformers' layout has a tensor for queries, one for keys and one for values.
JAMBA = mbx.LanguageModelConfig(
    40,
    (
        mbx.BlockConfig(
            mbx.Mamba1Config(64, select_norm="weighted", select_norm_eps=1e-6),
            mlp=mbx.GatedMLPConfig(96),
            norm_eps=1e-6,
        ),
        mbx.BlockConfig(
            mbx.AttentionConfig(64, nheads=4, nheads_kv=2, rotary_emb_dim=0),
            mlp=mbx.GatedMLPConfig(96),
            norm_eps=1e-6,
        ),
    ),
    norm_eps=1e-6,
)
TIED = mbx.LanguageModelConfig(40, (MAMBA, MAMBA))


def build(config: mbx.LanguageModelConfig, **options: Any) -> mbx.LanguageModel:
    return config.build(key=jr.key(0), **options)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("jamba", "transformers", marks=pytest.mark.slow),
        ("tied", "state-spaces"),
        ("tied", "mistral"),
    ],
)
def test_round_trip(name: str, layout: str, bits: Any, tmp_path: Path):
    config = {"jamba": JAMBA, "tied": TIED}[name]
    if layout == "mistral":
        block = mbx.BlockConfig(mbx.Mamba2Config(64))
        config = mbx.LanguageModelConfig(40, (block,), tie_embeddings=False)
    model = mbx.quantize(build(config), bits=bits, group=32, keep=["0.mixer.in_proj"])
    mbx.save_pretrained(model, tmp_path, layout=layout)
    assert eqx.tree_equal(mbx.from_pretrained(tmp_path), model)
    narrow = mbx.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert eqx.tree_equal(narrow, mbx.cast(model, jnp.bfloat16))


def test_names_and_dtypes(tmp_path: Path):
    mbx.save_pretrained(mbx.quantize(build(JAMBA), bits=4, group=32), tmp_path)
    tensors = open_safetensors(tmp_path / "model.safetensors")
    query = "model.layers.1.self_attn.q_proj.weight"
    found = {name: (t.shape, t.dtype) for name, t in tensors.items() if name.startswith(query)}
    assert found == {
        query: ((64, 32), np.uint8),
        f"{query}_scale": ((64, 2), np.float32),
    }
    assert "transformers" not in (tmp_path / "README.md").read_text()
    field = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert field == {"format": "mamba_eqx", "bits": 4, "group": 32}


@pytest.mark.parametrize("stacked", [False, True])
def test_state_dict(stacked: bool):
    model = mbx.quantize(build(TIED, stacked=stacked), bits=8, group=32)
    tensors = mbx.state_dict(model)
    assert tensors["backbone.layers.1.mixer.in_proj.weight"].dtype == jnp.int8
    assert eqx.tree_equal(mbx.load_state_dict(model, tensors), model)
    scales = mbx.state_dict(eqx.filter(model, eqx.is_inexact_array))
    assert "lm_head.weight_scale" in scales
    assert "lm_head.weight" not in scales


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [pytest.param("jamba", marks=pytest.mark.slow), "tied"])
def test_quantizes_while_loading(name: str, stored: str, tmp_path: Path):
    model = build({"jamba": JAMBA, "tied": TIED}[name], dtype=stored)
    mbx.save_pretrained(model, tmp_path)
    for bits in (8, 4):
        got = mbx.from_pretrained(tmp_path, quantize=bits)
        assert eqx.tree_equal(got, mbx.quantize(model, bits=bits))
    options = mbx.Quantization(4, 32, keep=["lm_head", "x_proj"])
    want = mbx.quantize(model, bits=4, group=32, keep=["lm_head", "x_proj"])
    assert eqx.tree_equal(mbx.from_pretrained(tmp_path, quantize=options), want)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    mbx.save_pretrained(mbx.quantize(build(TIED), bits=8, group=32), tmp_path)
    return tmp_path


IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({IN_PROJ: None}, f"1 missing: {IN_PROJ}"),
        ({f"{IN_PROJ}_scale": None}, f"1 not of a floating-point dtype: '{IN_PROJ}' is int8"),
        ({f"{IN_PROJ}_scale": ((192, 3), "float32")}, r"is \(192, 3\) and should be \(192, 2\)"),
        ({f"{IN_PROJ}_scale": ((192, 2), "int32")}, f"'{IN_PROJ}_scale' is int32"),
        ({IN_PROJ: ((192, 64), "float32")}, f"{IN_PROJ} is float32 and should be int8"),
        ({IN_PROJ: ((192, 64), "uint8")}, f"{IN_PROJ} is uint8 and should be int8"),
        ({IN_PROJ: ((192, 32), "int8")}, r"is \(192, 32\) and should be \(192, 64\)"),
        ({"backbone.norm_f.weight": ((64,), "int8")}, "'backbone.norm_f.weight' is int8"),
        ({"backbone.norm_f.weight_scale": ((64, 2), "float32")}, "1 unexpected: .*norm_f"),
    ],
)
def test_damaged_tensors_are_named(change: dict[str, Any], message: str, saved: Path):
    file = saved / "model.safetensors"
    tensors = {name: np.array(t.read()) for name, t in open_safetensors(file).items()}
    for name, made in change.items():
        tensors.pop(name, None)
        if made is not None:
            tensors[name] = np.ones(*made)
    write_safetensors(file, tensors, {"format": "pt"})
    with pytest.raises(mbx.CheckpointError, match=message):
        mbx.from_pretrained(saved)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"bits": 5}, "`bits` must be 8 or 4, but got bits=5"),
        ({"bits": 8.0}, r"`bits` must be 8 or 4, but got bits=8\.0"),
        ({"bits": 4}, "is int8 and should be uint8"),
        ({"group": 31}, "`group` must be a multiple of 32, but got group=31"),
        ({"group": 64}, r"weight_scale is \(192, 2\) and should be \(192, 1\)"),
        ({"zero_point": True}, "must have `format` 'mamba_eqx', `bits` and `group`"),
        ({"format": "other"}, "must have `format` 'mamba_eqx'"),
        ({"bits": None}, "`bits` must be 8 or 4"),
    ],
)
def test_invalid_configs_are_named(
    field: dict[str, Any], message: str, saved: Path, as_users_run: None
):
    path = saved / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= field
    path.write_text(json.dumps(values))
    with pytest.raises(mbx.CheckpointError, match=message):
        mbx.from_pretrained(saved)


def test_config_and_weights_must_agree(saved: Path, tmp_path: Path):
    path = saved / "config.json"
    values = json.loads(path.read_text())
    field = values.pop("quantization_config")
    path.write_text(json.dumps(values))
    with pytest.raises(mbx.CheckpointError, match=r"unexpected.*not of a floating-point dtype"):
        mbx.from_pretrained(saved)
    mbx.save_pretrained(build(TIED), saved)
    values = json.loads(path.read_text()) | {"quantization_config": field}
    path.write_text(json.dumps(values))
    with pytest.raises(mbx.CheckpointError, match="but no weight has scales"):
        mbx.from_pretrained(saved)


def test_quantizing_twice_raises(saved: Path, as_users_run: None):
    with pytest.raises(ValueError, match="quantised already, but has weights of 8 bits"):
        mbx.from_pretrained(saved, quantize=4)
    with pytest.raises(ValueError, match="`bits` must be 8 or 4, but got bits=3"):
        mbx.from_pretrained(saved, quantize=3)  # pyright: ignore[reportArgumentType]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="`quantize` and `sharding` cannot be used together"):
        mbx.from_pretrained(saved, quantize=4, sharding=one)
    assert mbx.from_pretrained(saved, sharding=one).lm_head is not None


def test_mixed_bits_are_not_saved(tmp_path: Path):
    model = mbx.quantize(build(TIED), bits=8)
    head = QuantizedLinear.of(
        mbx.layers.Linear(64, 40, use_bias=False, key=jr.key(0)), bits=4, group=32
    )
    mixed = eqx.tree_at(lambda m: m.lm_head, model, head)
    with pytest.raises(mbx.CheckpointError, match="lm_head has bits=4 and group=32 where bits=8"):
        mbx.save_pretrained(mixed, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parity
@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_refuses(bits: Any, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    mbx.save_pretrained(mbx.quantize(build(TIED), bits=bits), tmp_path)
    for kind in (transformers.MambaForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"quantization config .* has no `quant_method`"):
            kind.from_pretrained(tmp_path)


PEAK = """
    import ctypes, gc, json, sys, threading, time
    from pathlib import Path
    import jax, mamba_eqx as mbx

    def memory():
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(s.split()[1]) for s in lines if s.startswith("RssAnon"))

    def load():
        return jax.block_until_ready(mbx.from_pretrained(sys.argv[1], quantize=int(sys.argv[2])))

    load()  # Compilation takes memory too, more or less of it by the processor and the load.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = peak = memory()
    done = False
    def watch():
        global peak
        while not done:
            peak = max(peak, memory())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    done = True
    watcher.join()
    print(json.dumps([peak - start, sum(leaf.nbytes for leaf in jax.tree.leaves(model))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("bits", [8, 4])
def test_peak_memory_while_loading(bits: int, tmp_path: Path):
    """A checkpoint of 400 MB never takes nearly as much, mapped files aside."""
    block = mbx.BlockConfig(mbx.Mamba1Config(1024))
    config = mbx.LanguageModelConfig(256, (block,) * 15)
    mbx.save_pretrained(config.build(key=jr.key(0)), tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 4e8
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path), str(bits)]
    # Otherwise glibc keeps large parts of what was freed, the more the busier the machine is.
    keeps_nothing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=os.environ | keeps_nothing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, model = json.loads(done.stdout.splitlines()[-1])
    assert model < size * (0.32 if bits == 8 else 0.2)
    # Besides the model, one weight of 16 MB and what its rounding needs.
    assert peak < model + 1e8
