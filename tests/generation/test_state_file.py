"""Tests of saving and loading states."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mamba_eqx as mbx
from mamba_eqx.generation._state_file import fingerprint
from tests.support.generation import MODEL, VOCAB, make, row


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompts", [[1, 2, 3], [[1], [2, 3]]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_saved_state_loads_unchanged(tmp_path, stacked, prompts, dtype):
    model = mbx.cast(make(stacked=stacked), jnp.dtype(dtype))
    first = mbx.generate(model, prompts, 4)
    mbx.save_state(tmp_path / "state", first.state, model)
    state = mbx.load_state(tmp_path / "state", model)
    assert eqx.tree_equal(state, first.state)
    again, want = (mbx.generate(model, None, 5, state=s) for s in (state, first.state))
    assert eqx.tree_equal(again, want)


def test_state_of_another_model_raises(tmp_path):
    mbx.save_state(tmp_path / "state", mbx.prefill(MODEL, [1, 2]), MODEL)
    weight = MODEL.embedding.weight
    other = eqx.tree_at(
        lambda model: model.embedding.weight, MODEL, weight.at[3, 2].set(weight[3, 2] * 1.0001)
    )
    for model in (other, mbx.cast(MODEL, jnp.bfloat16), make(stacked=True)):
        with pytest.raises(mbx.CheckpointError, match="the state of another model"):
            mbx.load_state(tmp_path / "state", model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the state files of a recurrent model, and of one with attention and two rows."""
    folder = tmp_path_factory.mktemp("states")
    block = mbx.BlockConfig(mbx.AttentionConfig(6, nheads=2))
    config = mbx.LanguageModelConfig(VOCAB, (block,) * 2)
    models = {"recurrent": MODEL, "attention": config.build(stacked=True, key=jax.random.key(0))}
    prompts = {"recurrent": [1, 2, 3], "attention": [[1, 2, 3], [4]]}
    for name, model in models.items():
        mbx.save_state(folder / name, mbx.prefill(model, prompts[name]), model)
    return folder, models


def edit(path, values):
    """Replaces the tensors of a file whose names end with the keys of `values`."""
    tensors = safetensors.numpy.load_file(path)
    for name, old in tensors.items():
        value = values.get(name.split(".")[-1])
        if value is not None:
            shape = np.shape(value) or old.shape
            tensors[name] = np.array(np.broadcast_to(value, shape), old.dtype)
    safetensors.numpy.save_file(tensors, path)


TEXT = [-1] * 61 + [1, 2, 3]
IMPOSSIBLE = {
    "large token": ({"token": 10**6}, "`token` must be within 0..10, but got 1000000"),
    "padding token": ({"token": VOCAB}, "`token` must be within 0..10, but got 11"),
    "negative token": ({"token": -1}, "`token` must be within 0..10, but got -1"),
    "negative position": ({"position": -1}, "`position` must be at least 0, but got -1"),
    "late position": ({"position": 2**31 - 3}, "`recent` must be -1 before the text"),
    "early position": ({"position": 1}, "`recent` must be -1 before the text"),
    "other last token": ({"token": 4}, "`recent` must end with `token`"),
    "large recent token": ({"recent": [*TEXT[:-2], 11, 3]}, "`recent` must be within -1..10"),
    "low recent token": ({"recent": [-2, *TEXT[1:]]}, "`recent` must be within -1..10"),
    "hole in the text": ({"recent": [*TEXT[:-2], -1, 3]}, "`recent` must be -1 before"),
    "no recent tokens": ({"recent": np.zeros(0)}, "`recent` must end with `token`"),
    "no rows": (
        {"token": np.zeros(0), "position": np.zeros(0), "recent": np.zeros((0, 64))},
        "does not contain the state",
    ),
    "hidden state": ({"ssm": np.nan}, r"`layers.*ssm` must be finite"),
    "convolution": ({"conv": np.inf}, r"`layers.*conv` must be finite"),
}


# The caches of two rows and two layers, which hold 2 and 0 tokens.
IMPOSSIBLE_CACHES = {
    "negative length": ({"length": [[2, 2], [-1, 0]]}, "length of a cache must be >= 0"),
    "layers of different length": ({"length": [[2, 1], [0, 0]]}, r"holds \[2, 1, 0, 0\] at"),
    "rows exchanged": ({"length": [[0, 0], [2, 2]]}, r"holds \[0, 0, 2, 2\] at position \[2, 0\]"),
    "fuller than its room": (
        {"k": np.zeros((2, 2, 2, 1, 3)), "v": np.zeros((2, 2, 2, 1, 3))},
        "with room for 1 tokens must hold `position` tokens, but holds",
    ),
    "keys without values": ({"v": np.zeros((2, 2, 2, 17, 3))}, "room for equally many tokens"),
    "infinite key": ({"k": -np.inf}, r"`layers.*k` must be finite"),
    "another row": ({"token": [3, 11]}, "`token` must be within 0..10, but got 11"),
}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        pytest.param(name, *case, id=case_id)
        for name, cases in (("recurrent", IMPOSSIBLE), ("attention", IMPOSSIBLE_CACHES))
        for case_id, case in cases.items()
    ],
)
def test_impossible_values_raise(tmp_path, saved, name, values, message):
    folder, models = saved
    shutil.copy(folder / name, tmp_path / "state")
    edit(tmp_path / "state", {})
    mbx.load_state(tmp_path / "state", models[name])
    edit(tmp_path / "state", values)
    with pytest.raises(mbx.CheckpointError, match=message) as caught:
        mbx.load_state(tmp_path / "state", models[name])
    assert str(tmp_path / "state") in str(caught.value)


def test_late_position_of_a_text_longer_than_the_window_raises(tmp_path, saved):
    """Continuing from such a position would reserve 128 GiB for the caches."""
    folder, models = saved
    shutil.copy(folder / "attention", tmp_path / "state")
    recent = np.tile(np.arange(64, dtype=np.int32) % VOCAB, (2, 1))
    late = {"position": 2**31 - 3, "recent": recent, "token": recent[:, -1]}
    edit(tmp_path / "state", late)
    with pytest.raises(mbx.CheckpointError, match="with room for 16 tokens must hold `position`"):
        mbx.load_state(tmp_path / "state", models["attention"])


@pytest.mark.slow
def test_every_way_of_making_a_state_makes_a_possible_one(tmp_path):
    """Ragged rows, stops, windows, forks, speculation and learned states load unchanged."""
    attention = mbx.AttentionConfig(6, nheads=2, d_conv=2)
    window = mbx.AttentionConfig(6, nheads=2, window=4)
    mamba1, mamba3 = mbx.Mamba1Config(6), mbx.Mamba3Config(6, d_inner=12, headdim=3)
    for mixers in [(attention, mamba1), (window, mamba3)]:
        blocks = tuple(map(mbx.BlockConfig, mixers))
        model = mbx.LanguageModelConfig(VOCAB, blocks).build(key=jax.random.key(0))
        stopping = mbx.Sampling(stop_tokens=[1, 2, 3], temperature=1.0)
        key = jax.random.key(1)
        ragged = mbx.generate(model, [[1], [2, 3, 4], [5, 5]], 20, stopping, key=key).state
        long = mbx.prefill(model, [*range(VOCAB)] * 9, room=50)
        lookup = mbx.generation.PromptLookup()
        states = [
            ragged,
            mbx.generate(model, [[], [2, 3, 4], [5, 5]], 5, state=ragged).state,
            long,
            mbx.fork(long, 3),
            mbx.prefill(model, [3]),
            mbx.speculate(model, lookup, [1, 2, 1, 2, 3], 20).state,
        ]
        if attention not in mixers:
            _, layers = model.scan(jnp.arange(6))
            states += [
                mbx.generation.decoding_state(model, layer_state, 3)
                for layer_state in (model.init_state(), layers)
            ]
        for state in states:
            mbx.save_state(tmp_path / "state", state, model)
            assert eqx.tree_equal(mbx.load_state(tmp_path / "state", model), state)


def test_fingerprint_depends_on_every_entry():
    """A swap of two entries changes it too."""
    seen = {fingerprint(MODEL).tobytes()}
    leaves, structure = jax.tree.flatten(MODEL)
    for i, leaf in enumerate(leaves):
        flat = np.asarray(leaf).reshape(-1)
        for at in {0, flat.size // 2, flat.size - 1}:
            changed = flat.copy()
            changed[at] = np.nextafter(changed[at], np.inf)
            swapped = flat.copy()
            swapped[[at, 1]] = swapped[[1, at]]
            for values in (changed, swapped):
                if np.array_equal(values, flat):
                    continue
                other = [*leaves[:i], jnp.asarray(values.reshape(leaf.shape)), *leaves[i + 1 :]]
                mark = fingerprint(jax.tree.unflatten(structure, other)).tobytes()
                assert mark not in seen
                seen.add(mark)


def test_invalid_state_files_raise(tmp_path):
    mbx.save_pretrained(mbx.cast(make(), jnp.float32), tmp_path / "model", layout="state-spaces")
    (tmp_path / "noise").write_bytes(b"\x08" + bytes(40))
    mbx.save_state(tmp_path / "state", mbx.generate(MODEL, [1], 3).state, MODEL)
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-5])
    for name, message in [
        ("noise", "noise"),
        ("cut", "cut"),
        ("model/model.safetensors", "it has no 'fingerprint'"),
    ]:
        with pytest.raises(mbx.CheckpointError, match=message):
            mbx.load_state(tmp_path / name, MODEL)
    with pytest.raises(FileNotFoundError):
        mbx.load_state(tmp_path / "nowhere", MODEL)
    state = mbx.load_state(tmp_path / "state", MODEL)
    assert row(mbx.generate(MODEL, None, 2, state=state))
