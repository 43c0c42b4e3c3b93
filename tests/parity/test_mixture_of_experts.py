"""`MixtureOfExperts` beside the layers of transformers, in float64."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import mamba_eqx as mbx
from tests.support.checkpoints import HYBRIDS, make
from tests.support.ops import assert_close
from tests.support.parity import load_theirs


pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("compile_fast")]

D, WIDTH = 8, 6


@pytest.fixture
def double(torch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch, with float64 in place of the float32 that the routers cast to."""
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch


def value_first(weight: jax.Array) -> jax.Array:
    """Swaps the halves of `gate_up_proj`, of which transformers has the gate first."""
    return jnp.concatenate(jnp.split(weight, 2, axis=1)[::-1], axis=1)


def granite() -> tuple[Any, mbx.MixtureOfExperts, dict[str, Any]]:
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

    config = GraniteMoeHybridConfig(
        hidden_size=D,
        mamba_n_heads=2,
        intermediate_size=WIDTH,
        num_local_experts=5,
        num_experts_per_tok=3,
    )
    mixture = mbx.MixtureOfExperts(D, WIDTH, n_experts=5, top_k=3, key=jr.key(0))
    return granite.GraniteMoeHybridMoE(config), mixture, GATED


def jamba() -> tuple[Any, mbx.MixtureOfExperts, dict[str, Any]]:
    from transformers import JambaConfig
    from transformers.models.jamba import modeling_jamba as jamba

    config = JambaConfig(
        hidden_size=D, intermediate_size=WIDTH, num_experts=5, num_experts_per_tok=2
    )
    mixture = mbx.MixtureOfExperts(D, WIDTH, n_experts=5, top_k=2, routing="softmax", key=jr.key(0))
    return jamba.JambaSparseMoeBlock(config), mixture, GATED


def nemotron(
    d_latent: int | None, renormalise: bool
) -> tuple[Any, mbx.MixtureOfExperts, dict[str, Any]]:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

    config = NemotronHConfig(
        hidden_size=D,
        moe_intermediate_size=WIDTH,
        moe_shared_expert_intermediate_size=7,
        moe_latent_size=d_latent,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
        mlp_bias=False,
    )
    mixture = mbx.MixtureOfExperts(
        D,
        WIDTH,
        n_experts=8,
        top_k=3,
        routing="sigmoid",
        n_group=4,
        topk_group=2,
        renormalise=renormalise,
        scaling=2.5,
        gated=False,
        d_shared=7,
        d_latent=d_latent,
        key=jr.key(0),
    )
    latent = {
        "fc1_latent_proj.weight": lambda m: m.fc1_latent.weight,
        "fc2_latent_proj.weight": lambda m: m.fc2_latent.weight,
    }
    return nemotron.NemotronHMoE(config), mixture, UNGATED | (latent if d_latent else {})


GATED = {
    "router.weight": lambda m: m.router.weight,
    "experts.gate_up_proj": lambda m: m.fc1,
    "experts.down_proj": lambda m: m.fc2,
}
UNGATED = {
    "gate.weight": lambda m: m.router.weight,
    "gate.e_score_correction_bias": lambda m: m.router.correction_bias,
    "experts.up_proj": lambda m: m.fc1,
    "experts.down_proj": lambda m: m.fc2,
    "shared_experts.up_proj.weight": lambda m: m.shared.fc1.weight,
    "shared_experts.down_proj.weight": lambda m: m.shared.fc2.weight,
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(granite, id="granite"),
        pytest.param(jamba, id="jamba"),
        pytest.param(lambda: nemotron(None, True), id="nemotron"),
        pytest.param(lambda: nemotron(5, False), id="nemotron_latent"),
    ],
)
def test_values_and_gradients_match_transformers(make: Any, double: Any):
    torch, rng = double, np.random.default_rng(0)
    with jax.enable_x64(True):
        theirs, ours, names = make()
        theirs = theirs.double()
        state = {
            name: torch.tensor(0.5 * rng.standard_normal(tensor.shape))
            for name, tensor in theirs.state_dict().items()
        }
        assert state.keys() == names.keys()
        theirs.load_state_dict(state)

        def ordered(name: str, tensor: Any) -> jax.Array:
            array = jnp.asarray(tensor.numpy(force=True))
            return value_first(array) if name == "experts.gate_up_proj" else array

        for name, where in names.items():
            ours = eqx.tree_at(where, ours, ordered(name, state[name]))

        x = rng.standard_normal((13, D))
        x_torch = torch.tensor(x[None], requires_grad=True)
        y = theirs(x_torch)
        torch.sum(torch.sin(y)).backward()

        def loss(ours: mbx.MixtureOfExperts, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = ours(x)
            return jnp.sum(jnp.sin(y)), y

        grads, got = jax.grad(lambda args: loss(*args), has_aux=True)((ours, jnp.asarray(x)))
        assert_close(got, jnp.asarray(y[0].numpy(force=True)), rtol=1e-13)
        assert_close(grads[1], jnp.asarray(x_torch.grad[0].numpy()), rtol=1e-12)
        for name, parameter in theirs.named_parameters():
            assert_close(names[name](grads[0]), ordered(name, parameter.grad), rtol=1e-12)
        if ours.router.correction_bias is not None:
            assert not np.any(grads[0].router.correction_bias)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_matches_transformers(masked: bool, double: Any):
    """Value and gradients, over two layers and all rows together."""
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

    torch, rng = double, np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 7, 5))
    mask = rng.random((3, 7)) < 0.6
    theirs = torch.tensor(logits, requires_grad=True)
    want: Any = granite.load_balancing_loss_func(
        tuple(layer.reshape(-1, 5) for layer in theirs),
        num_experts=5,
        top_k=2,
        attention_mask=torch.tensor(mask) if masked else None,
    )
    want.backward()

    def loss(logits: jax.Array) -> jax.Array:
        router = mbx.layers.Router(5, 5, 2, key=jr.key(0))
        router = eqx.tree_at(lambda r: r.weight, router, jnp.eye(5))
        routes = [router(layer) for layer in logits]
        return mbx.training.load_balancing_loss(routes, mask if masked else None)

    with jax.enable_x64(True):
        got, grad = jax.value_and_grad(loss)(jnp.asarray(logits))
        assert_close(got, jnp.asarray(want.item()), rtol=1e-13)
        assert_close(grad, jnp.asarray(theirs.grad.numpy()), rtol=1e-12)


@pytest.mark.slow
def test_balanced_loss_matches_transformers(torch: Any, tmp_path: Any):
    """The loss of a model in training. The last token, which has no target, does not count."""
    ours = make(HYBRIDS["transformers"]["granite_experts"])
    mbx.save_pretrained(ours, tmp_path)
    theirs = load_theirs(tmp_path, "GraniteMoeHybridForCausalLM").double()
    theirs.router_aux_loss_coef = 0.5
    text = np.arange(20).reshape(2, 10) * 7 % 13
    real = np.ones_like(text)
    real[:, -1] = 0
    out = theirs(
        torch.tensor(text),
        attention_mask=torch.tensor(real),
        labels=torch.tensor(text),
        output_router_logits=True,
        use_cache=False,
    )
    no, yes = np.zeros((2, 9), np.bool_), np.ones((2, 9), np.bool_)
    batch = mbx.training.Batch(text[:, :-1], text[:, 1:], no, yes)
    with jax.enable_x64(True):
        got, _ = mbx.training.next_token_loss(mbx.cast(ours, "float64"), batch, balance=0.5)
    assert abs(float(got) - out.loss.item()) < 1e-6
    assert out.aux_loss.item() > 2
