"""The kinds of files that the package reads, with a valid example and the public reader of each."""

import dataclasses
import functools
import json
import lzma
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mamba_eqx as mbx
from mamba_eqx import training
from tests.support import checkpoints, torch_files
from tests.support.mutants import LINKS, NODES


Write = Callable[[Path], None]
Read = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    - `examples`: functions that write valid files into an empty folder.
    - `targets`: patterns of the files to damage; the others stay valid.
    - `read`: reads the folder by public functions, and asserts that what is read is valid.
    - `errors`: the documented classes of errors.
    - `nodes`: what may take the place of a file. Links are left out where the user names the file
        itself, or where the folder is the user's own.
    - `may_write`: whether the reader may change the folder.
    - `names_file`: whether errors must name the folder or the file.
    - `needs`: optional packages that the reader needs.
    """

    examples: Sequence[Write]
    targets: Sequence[str]
    read: Read
    errors: tuple[type[Exception], ...] = (mbx.CheckpointError,)
    nodes: Sequence[str] = (*NODES, *LINKS)
    may_write: bool = False
    names_file: bool = True
    needs: Sequence[str] = ()


# --- Checkpoints of models ---

_MODELS = {
    "mamba1": (checkpoints.config(padded_vocab_size=16, n_layer=1), "transformers"),
    "jamba": (checkpoints.HYBRIDS["transformers"]["jamba"], "transformers"),
    "bamba": (checkpoints.HYBRIDS["transformers"]["bamba"], "transformers"),
    "official": (checkpoints.HYBRIDS["state-spaces"]["mamba2"], "state-spaces"),
    "mamba3": (checkpoints.MAMBA3["state-spaces"]["mimo"], "state-spaces"),
    "mistral": (checkpoints.MISTRAL["mistral"]["tied"], "mistral"),
}


def _save(name: str, folder: Path, max_shard_size: int | None = None) -> None:
    config, layout = _MODELS[name]
    model = checkpoints.make(config)
    mbx.save_pretrained(model, folder, layout=layout, max_shard_size=max_shard_size)
    (folder / "README.md").unlink()


def _save_torch(name: str, folder: Path) -> None:
    _save(name, folder)
    (folder / "model.safetensors").unlink()
    config, layout = _MODELS[name]
    arrays = mbx.state_dict(checkpoints.make(config), layout=layout)
    data = torch_files.torch_bytes({key: np.asarray(value) for key, value in arrays.items()})
    (folder / "pytorch_model.bin").write_bytes(data)


def _read_model(folder: Path) -> mbx.LanguageModel:
    model = mbx.from_pretrained(folder)
    config = mbx.LanguageModelConfig.of(model)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))
    assert model.embedding.weight.shape[0] >= config.vocab_size
    return model


def _write_config(folder: Path) -> None:
    config = checkpoints.hybrid(checkpoints.mamba2(), checkpoints.ROTARY, checkpoints.mamba3())
    (folder / "model.json").write_text(config.to_json())


def _read_config(folder: Path) -> mbx.LanguageModelConfig:
    config = mbx.LanguageModelConfig.from_json((folder / "model.json").read_bytes().decode())
    assert mbx.LanguageModelConfig.from_json(config.to_json()) == config
    return config


# --- Tokenizers and templates ---


def _save_tokenizer(name: str, folder: Path) -> None:
    from tests.support import tokenizers

    (folder / "tokenizer.json").write_text(tokenizers.FILES[name])
    (folder / "chat_template.jinja").write_text(tokenizers.TEMPLATE)
    special = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|user|>"]}
    added = {"0": {"content": "<|endoftext|>", "special": True}}
    for file, values in {
        "tokenizer_config.json": tokenizers.CONFIG | {"added_tokens_decoder": added},
        "special_tokens_map.json": special,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 1},
        "config.json": {"model_type": "mamba", "vocab_size": 300, "eos_token_id": 0},
    }.items():
        (folder / file).write_text(json.dumps(values))


_TEXT = "To be <|user|> é 漢字 🙂"


def _read_tokenizer(folder: Path) -> None:
    tokenizer = mbx.load_tokenizer(folder)
    ids = tokenizer.encode(_TEXT)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert isinstance(tokenizer.decode(ids), str)
    decoder = tokenizer.decoder()
    assert isinstance(decoder.feed(ids) + decoder.flush(), str)
    assert all(isinstance(tokenizer.token_bytes(i), bytes) for i in ids)


_CHAT = [
    {"role": "user", "content": "To be? <|user|>"},
    {"role": "assistant", "content": "Or not."},
]


def _read_template(folder: Path) -> None:
    tokenizer = mbx.load_tokenizer(folder)
    assert isinstance(tokenizer, mbx.TextTokenizer)
    ids = tokenizer.encode_chat(_CHAT)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


# --- States of generations ---

_STATES = {
    "attention": [checkpoints.attention(d_conv=2), checkpoints.ROTARY],
    "mamba": [checkpoints.mamba3(), checkpoints.ODD, checkpoints.attention(window=4)],
}


@functools.cache
def _state_model(name: str) -> mbx.LanguageModel:
    return checkpoints.make(checkpoints.hybrid(*_STATES[name], d_intermediate=None))


def _save_state(name: str, folder: Path) -> None:
    """Saves a state of random values, which takes less time than a prefill."""
    model = _state_model(name)
    texts = [[1, 2, 3], [4]] if name == "attention" else [[*range(12)] * 8]
    position = np.array([len(text) - 1 for text in texts], np.int32)
    recent = np.full((len(texts), 64), -1, np.int32)
    for row, text in zip(recent, texts, strict=True):
        row[64 - min(len(text), 64) :] = text[-64:]
    random = np.random.default_rng(0)

    def filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.int32:  # the length of a cache
            return jnp.asarray(position)
        return jnp.asarray(random.normal(size=(len(texts), *shape.shape)).astype(shape.dtype))

    layers = jax.tree.map(filled, jax.eval_shape(lambda: model.init_state(max_len=16)))
    state = mbx.generation.DecodingState(
        layers, jnp.asarray(recent[:, -1]), jnp.asarray(position), jnp.asarray(recent)
    )
    mbx.save_state(folder / f"{name}.safetensors", state, model)


def _read_state(folder: Path) -> mbx.generation.DecodingState:
    path = next(folder.glob("*"), folder / "attention.safetensors")
    model = _state_model(path.stem)
    state = mbx.load_state(path, model)
    token, recent = np.asarray(state.token), np.asarray(state.recent)
    assert ((token >= 0) & (token < model.vocab_size)).all()
    assert ((recent >= -1) & (recent < model.vocab_size)).all()
    assert (recent[..., -1] == token).all()
    assert (np.asarray(state.position) >= 0).all()
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(np.asarray(leaf)).all()
    for layer in state.layers:
        if isinstance(layer, mbx.KVCache) and not layer.rolling:
            assert layer.k.shape == layer.v.shape
            assert (np.asarray(layer.length) == np.asarray(state.position)).all()
            assert (np.asarray(layer.length) <= layer.k.shape[-2]).all()
    return state


# --- Training ---


@functools.cache
def _lora_model(name: str) -> mbx.LanguageModel:
    return checkpoints.make(_MODELS[name][0])


def _save_lora(name: str, folder: Path) -> None:
    model = _lora_model(name)
    lora = training.LoRA.init(model, rank=2, key=jr.key(0))
    training.save_lora(lora, model, folder, layout=_MODELS[name][1])


def _read_lora(name: str, folder: Path) -> training.LoRA:
    model = _lora_model(name)
    lora = training.load_lora(folder, model, layout=_MODELS[name][1])
    weights = jax.tree.leaves(model)
    merged = jax.tree.leaves(jax.eval_shape(lora.merge, model))
    assert [leaf.shape for leaf in merged] == [leaf.shape for leaf in weights]
    return lora


_RUN = {"lr": 0.5, "name": "x"}


def _training_state(step: int) -> dict[str, Any]:
    return {
        "w": jnp.arange(6.0).reshape(2, 3) + step,
        "count": jnp.asarray(step),
        "key": jr.key(step),
        "half": jnp.full(3, step, jnp.bfloat16),
        "host": np.arange(3) + step,
        "rate": 0.5,
    }


def _save_run(folder: Path) -> None:
    saved = training.Checkpoints(folder, config=_RUN)
    for step in (3, 7):
        saved.save(step, _training_state(step), score=1.0 / step)


def _read_run(folder: Path) -> object:
    run = training.Checkpoints(folder, config=_RUN)
    assert all(isinstance(score, float) for score in run.scores.values())
    assert run.best is None or run.best in run.steps
    with warnings.catch_warnings():
        # What is set aside is reported as a warning.
        warnings.simplefilter("ignore", UserWarning)
        restored = run.restore(_training_state(0))
    if restored is not None:
        state, step = restored
        checkpoints.assert_same(_plain(state), _plain(_training_state(step)))
    return restored


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a state, with keys as their data."""
    return {
        name: jr.key_data(leaf) if name == "key" else leaf
        for name, leaf in state.items()
        if name != "rate"
    }


def _save_metrics(folder: Path) -> None:
    lines = [{"step": step, "loss": 2.0 / step, "lr": None} for step in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def _read_metrics(folder: Path) -> object:
    with warnings.catch_warnings():
        # Lines that are left out are reported as a warning.
        warnings.simplefilter("ignore", UserWarning)
        metrics = training.read_metrics(folder)
    for name, (steps, values) in metrics.items():
        assert isinstance(name, str)
        assert steps.shape == values.shape
        assert steps.dtype.kind == "i"
        assert values.dtype.kind == "f"
    return metrics


def _save_npy(folder: Path) -> None:
    training.write_tokens(folder / "a.npy", ["to be"] * 9, mbx.ByteTokenizer(), separator=0)


def _save_wide_npy(folder: Path) -> None:
    np.save(folder / "a.npy", np.arange(100, dtype=">u2"))


def _save_xz(folder: Path) -> None:
    (folder / "a.xz").write_bytes(lzma.compress(b"or not to be " * 20))


def _save_raw(folder: Path) -> None:
    np.arange(100, dtype=np.uint16).tofile(folder / "a.raw")


def _read_tokens(folder: Path) -> None:
    for path in [*folder.glob("*")] or [folder / "a.npy"]:
        wide = path.suffix == ".raw"
        tokens = training.read_tokens(path, dtype=np.uint16 if wide else np.uint8, vocab_size=256)
        assert tokens.ndim == 1
        assert tokens.dtype.kind in "ui"
        assert 0 <= tokens.min() <= tokens.max() < 256


def _each(write: Callable[[str, Path], None], names: Sequence[str]) -> list[Write]:
    return [functools.partial(write, name) for name in names]


_CONFIG_FILES = ("config.json", "params.json")

KINDS: dict[str, Kind] = {
    "safetensors": Kind(_each(_save, ["mamba1", "mistral"]), ["*.safetensors"], _read_model),
    "torch": Kind(_each(_save_torch, ["mamba1", "jamba"]), ["*.bin"], _read_model),
    "config": Kind(_each(_save, list(_MODELS)), _CONFIG_FILES, _read_model),
    "index": Kind(
        [
            functools.partial(_save, "mamba1", max_shard_size=1000),
            functools.partial(_save, "jamba", max_shard_size=4000),
        ],
        ["*.index.json"],
        _read_model,
    ),
    "model config": Kind([_write_config], ["*"], _read_config, (ValueError,), (), names_file=False),
    "tokenizer": Kind(
        _each(_save_tokenizer, ["byte_level", "sentencepiece"]),
        ["*.json"],
        _read_tokenizer,
        needs=["tokenizers"],
    ),
    "template": Kind(
        _each(_save_tokenizer, ["byte_level"]),
        ["*.jinja"],
        _read_template,
        (ValueError,),
        names_file=False,
        needs=["tokenizers", "jinja2"],
    ),
    "state": Kind(
        _each(_save_state, list(_STATES)),
        ["*"],
        _read_state,
        (mbx.CheckpointError, OSError),
        NODES,
    ),
    "lora": Kind(
        _each(_save_lora, ["mamba1"]),
        ["*"],
        functools.partial(_read_lora, "mamba1"),
        (mbx.CheckpointError, FileNotFoundError),
    ),
    "lora of a hybrid": Kind(
        _each(_save_lora, ["jamba"]),
        ["*"],
        functools.partial(_read_lora, "jamba"),
        (mbx.CheckpointError, FileNotFoundError),
    ),
    "training run": Kind(
        [_save_run],
        ["*"],
        _read_run,
        (mbx.CheckpointError, OSError),
        NODES,
        may_write=True,
    ),
    "metrics": Kind([_save_metrics], ["*"], _read_metrics, (mbx.CheckpointError, OSError), NODES),
    "tokens": Kind(
        [_save_npy, _save_wide_npy, _save_xz, _save_raw],
        ["*"],
        _read_tokens,
        (ValueError, OSError),
        NODES,
    ),
}
