"""`SequenceClassifier` and transformers' sequence classification agree, gradients included."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mamba_eqx as mbx
from tests.support.checkpoints import assert_same
from tests.support.parity import difference, honest_float64, load_theirs
from tests.support.parity_models import THEIRS


pytestmark = [pytest.mark.slow, pytest.mark.parity]

PAD = 29


def test_jamba_in_float64(torch, monkeypatch, tmp_path):
    """A batch with padding on the right, of which transformers finds the real tokens by their id
    and we by `length`. What we save of it, transformers loads."""
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    labels = {0: "a", 1: "b", 2: "c"}
    config = transformers.AutoConfig.for_model(
        "jamba", **THEIRS["jamba"]["jamba"], id2label=labels, pad_token_id=PAD
    )
    theirs = transformers.JambaForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    lengths, classes = np.array([7, 3, 5]), np.array([2, 0, 1])
    tokens = np.random.default_rng(0).integers(0, PAD, (3, 7))
    tokens = np.where(np.arange(7) < lengths[:, None], tokens, PAD)
    with honest_float64(torch, monkeypatch):
        out = theirs(torch.tensor(tokens), labels=torch.tensor(classes))
        out.loss.backward()
    theirs.save_pretrained(tmp_path / "theirs")
    with jax.enable_x64(True):
        model, names = mbx.load_classifier(tmp_path / "theirs", dtype=jnp.float64)

        @eqx.filter_jit
        @eqx.filter_value_and_grad(has_aux=True)
        def loss(model):
            logits = jax.vmap(model)(jnp.asarray(tokens), length=jnp.asarray(lengths))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(classes))
            return jnp.mean(losses), logits

        (value, logits), grads = loss(model)
        assert names == ("a", "b", "c")
        assert logits.dtype == jnp.float64
        assert difference(logits, out.logits.detach().numpy()) < 1e-12
        assert difference(value, out.loss.item()) < 1e-12
        ours = mbx.state_dict(grads.backbone) | {"score.weight": grads.score.weight}
        want = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
        assert ours.keys() == want.keys()
        for name in want:
            assert difference(ours[name], want[name]) < 1e-11, name
        mbx.save_classifier(model, tmp_path / "ours", labels=names)
        back = load_theirs(tmp_path / "ours", "JambaForSequenceClassification")
        assert back.config.id2label == labels
        for name, parameter in theirs.named_parameters():
            assert torch.equal(back.get_parameter(name), parameter), name
        assert_same(mbx.load_classifier(tmp_path / "ours")[0], model)
