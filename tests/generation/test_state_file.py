"""Tests of saving and loading states."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_eqx as mbx
from mamba_eqx.generation._state_file import fingerprint
from tests.support.generation import MODEL, make, row


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
