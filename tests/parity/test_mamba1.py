"""Agreement with other implementations: the golden files, and transformers as installed."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mamba_eqx as mbx
from mamba_eqx.pretrained import from_pretrained, save_pretrained, state_dict
from tests.pretrained.test_mamba1 import BIASED, ODD, config, make


GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    "mamba_tiny": "transformers",
    "mamba_tied": "transformers",
    "state_spaces_mamba": "state-spaces",
    "mamba2_tiny": "transformers",
    "falcon_tiny": "transformers",
    "state_spaces_mamba2": "state-spaces",
}


def difference(got, want):
    """The largest difference, in units of the largest entry."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.all(np.isfinite(got))
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


@pytest.fixture(params=CASES)
def case(request):
    """A checkpoint, its layout, and what others compute with it."""
    folder = GOLDEN / request.param
    return folder, CASES[request.param], load_file(folder / "golden.safetensors")


@eqx.filter_jit
def run(model, tokens):
    def loss(model):
        logits, state = model.scan(tokens)
        log_probs = jax.nn.log_softmax(logits[:-1])
        of_targets = jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)
        return -jnp.mean(of_targets), (logits, state)

    (value, (logits, state)), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return value, logits, state, model.hidden_states(tokens), grads


def test_golden_float64(case):
    folder, layout, golden = case
    with jax.enable_x64(True):
        model = from_pretrained(folder, dtype=jnp.float64)
        loss, logits, states, hidden, grads = run(model, jnp.asarray(golden["tokens"]))
        got = {"loss": loss, "logits": logits, "hidden_states.norm_f": hidden[-1]}
        for i, state in enumerate(states):
            got[f"hidden_states.{i}"] = hidden[i]
            got[f"state.{i}.ssm"] = jnp.moveaxis(state.ssm, 0, -1)
            # The oldest column there is of no use to what follows.
            golden[f"state.{i}.conv"] = golden[f"state.{i}.conv"][:, 1:]
            got[f"state.{i}.conv"] = state.conv.T
        got |= {f"grad.{name}": grad for name, grad in state_dict(grads, layout=layout).items()}
        assert got.keys() == golden.keys() - {"tokens", "greedy", "logits_float32"}
        off = {name: difference(got[name], golden[name]) for name in got}
    assert max(off.values()) < 1e-10, off


@pytest.mark.slow
def test_golden_float32(case):
    folder, _, golden = case
    model = from_pretrained(folder)
    logits, state = eqx.filter_jit(model.scan)(jnp.asarray(golden["tokens"]))
    assert logits.dtype == jnp.float32
    assert difference(logits, golden["logits"]) < 1e-5
    if "logits_float32" in golden:
        assert difference(logits, golden["logits_float32"]) < 1e-5
    step, tokens, last = eqx.filter_jit(model.step), [], logits[-1]
    while len(tokens) < len(golden["greedy"]):
        tokens.append(jnp.argmax(last))
        last, state = step(tokens[-1], state)
    assert np.array_equal(tokens, golden["greedy"])


# transformers.

OURS = {
    "odd": config(ODD, norm_eps=3e-4, padded_vocab_size=16),
    "biased_untied": config(BIASED, tie_embeddings=False, residual_in_fp32=False),
    "wide_taps": config(
        mbx.Mamba1Config(d_model=11, d_inner=37, d_state=5, d_conv=2, dt_rank=9, bias=True),
        n_layer=3,
        norm_eps=1e-3,
    ),
}

THEIRS = {
    "odd": {
        "vocab_size": 31,
        "hidden_size": 17,
        "state_size": 5,
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 2e-3,
        "expand": 3,
        "intermediate_size": 29,
        "conv_kernel": 6,
        "use_bias": True,
        "use_conv_bias": False,
        "residual_in_fp32": False,
        "time_step_rank": 7,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
        "time_step_floor": 1e-3,
    },
    "default": {"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2},
    "expand": {"vocab_size": 30, "hidden_size": 9, "num_hidden_layers": 1, "expand": 3},
}


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def their_model(torch, fields, model_type="mamba"):
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def their_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].float().numpy()


def load_theirs(folder, architecture="MambaForCausalLM"):
    """With transformers, which warns only of what it does not find."""
    import transformers  # pyright: ignore[reportMissingImports]

    load = getattr(transformers, architecture).from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def check_they_load(torch, model, folder, architecture, *, seq=25, max_shard_size=2000):
    """transformers loads what we save, bit by bit, and computes the same."""
    model = jax.tree.map(lambda leaf: 0.5 * leaf, model)
    save_pretrained(model, folder, max_shard_size=max_shard_size)
    theirs = load_theirs(folder, architecture)
    tokens = np.arange(seq) * 7 % 13
    logits = eqx.filter_jit(model)(jnp.asarray(tokens))
    assert difference(logits, their_logits(torch, theirs, tokens)) < 1e-5
    for key, tensor in state_dict(model).items():
        assert np.array_equal(theirs.state_dict()[key].numpy(), tensor)


# What transformers' configs say of how texts end, and where the model was.
OF_OURS = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"}


def check_we_load(torch, theirs, folder, of_ours, *, seq=25, max_shard_size="3KB"):
    """We load what transformers saves, and it what we save of that: the logits before and after,
    the config the same but for the fields `of_ours`."""
    theirs.save_pretrained(folder / "theirs", max_shard_size=max_shard_size)
    model = from_pretrained(folder / "theirs")
    tokens = np.arange(seq) * 11 % 29
    want = their_logits(torch, theirs, tokens)
    assert difference(eqx.filter_jit(model)(jnp.asarray(tokens)), want) < 1e-5

    save_pretrained(model, folder / "ours")
    back = load_theirs(folder / "ours", type(theirs).__name__)
    there, here = theirs.config.to_dict(), back.config.to_dict()
    assert {k for k in there if there[k] != here.get(k)} <= OF_OURS | of_ours
    return want, their_logits(torch, back, tokens)


@pytest.mark.parity
@pytest.mark.parametrize("max_shard_size", [None, 2000])
@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_ours(name, max_shard_size, torch, tmp_path):
    model = make(OURS[name])
    check_they_load(torch, model, tmp_path, "MambaForCausalLM", max_shard_size=max_shard_size)


@pytest.mark.parity
@pytest.mark.parametrize("max_shard_size", ["1GB", "3KB"])
@pytest.mark.parametrize("name", THEIRS)
def test_ours_loads_transformers(name, max_shard_size, torch, tmp_path):
    theirs = their_model(torch, THEIRS[name])
    of_ours = {
        "expand",  # in contradiction with `intermediate_size`, which wins
        "initializer_range",
        "time_step_floor",
    }
    want, again = check_we_load(torch, theirs, tmp_path, of_ours, max_shard_size=max_shard_size)
    assert np.array_equal(again, want)


@pytest.mark.parity
def test_ours_loads_torch_files(torch, tmp_path):
    theirs = their_model(torch, THEIRS["default"])
    theirs.save_pretrained(tmp_path)
    want = from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # With the tied head.
    assert eqx.tree_equal(from_pretrained(tmp_path), want)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_loads_ours_in_half_precision(dtype, torch, tmp_path):
    model = make(OURS["odd"], dtype)
    save_pretrained(model, tmp_path)
    theirs = load_theirs(tmp_path)
    assert theirs.dtype == getattr(torch, dtype)
    for key, tensor in state_dict(model).items():
        loaded = theirs.state_dict()[key]
        # It has one dtype for all.
        assert loaded.dtype == theirs.dtype
        want = np.asarray(tensor.astype(dtype)).astype(np.float32)
        assert np.array_equal(loaded.float().numpy(), want)


@pytest.mark.parity
def test_our_bfloat16_is_nearer_to_the_truth(torch, tmp_path):
    theirs = their_model(torch, THEIRS["default"])
    tokens = np.arange(25) * 11 % 29
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    truth = eqx.filter_jit(from_pretrained(tmp_path, dtype=jnp.float32))(jnp.asarray(tokens))
    ours = eqx.filter_jit(from_pretrained(tmp_path))(jnp.asarray(tokens))
    assert difference(ours, truth) < 0.05
    assert difference(ours, truth) < difference(their_logits(torch, theirs, tokens), truth)
