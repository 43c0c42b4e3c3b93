"""Compares one layer of each mixer: time per token of a forward pass, a gradient and a step.

    python benchmarks/mixers.py [--quick]

All layers have `d_model` 768 and upstream's default sizes, in float32; attention has 12 heads of
64. Other libraries are not measured.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _common import Competitors, arguments, compiled, medians, print_facts, print_table
from jax import lax
from jaxtyping import PyTree

import mamba_eqx as mbx


STEPS = 64
Mixer = mbx.AbstractSequenceLayer[PyTree]


def both(mixer: Mixer, x: jax.Array) -> PyTree:
    """Returns a loss, and its gradients with respect to the parameters and the input."""
    return jax.value_and_grad(lambda mixer, x: jnp.sum(jnp.sin(mixer(x))), argnums=(0, 1))(mixer, x)


def steps(mixer: Mixer, x: jax.Array, state: PyTree) -> PyTree:
    """Returns the state and the outputs after a step for each token, in a compiled loop."""

    def step(state: PyTree, x: jax.Array) -> tuple[PyTree, jax.Array]:
        y, state = mixer.step(x, state)
        return state, y

    return lax.scan(step, state, x)


def main() -> None:
    options = arguments(__doc__)
    quick = options.quick
    print_facts("Mixers", quick=quick)
    seq, d_model = (32, 64) if quick else (2048, 768)
    configs: dict[str, mbx.models.AbstractMixerConfig] = {
        "Mamba-1": mbx.Mamba1Config(d_model),
        "Mamba-2": mbx.Mamba2Config(d_model),
        "Mamba-3, SISO": mbx.Mamba3Config(d_model),
        "Mamba-3, MIMO, rank 4": mbx.Mamba3Config(d_model, mimo_rank=4),
        "attention": mbx.AttentionConfig(d_model, nheads=d_model // 64, rotary_emb_dim=64),
    }
    forwards: Competitors = {}
    boths: Competitors = {}
    decodes: Competitors = {}
    x = jr.normal(jr.key(1), (seq, d_model))
    for name, config in configs.items():
        mixer = config.build(key=jr.key(0))
        # The cost of a step of attention depends on the tokens before it.
        state = eqx.filter_jit(mixer.scan)(x, mixer.init_state(max_len=seq + STEPS))[1]
        forwards[name] = compiled(lambda mixer, x: mixer(x), mixer, x)[0]
        boths[name] = compiled(both, mixer, x)[0]
        decodes[name] = compiled(steps, mixer, x[:STEPS], state)[0]
    times = [medians(runs) for runs in (forwards, boths, decodes)]
    per_token = (1e6 / seq, 1e6 / seq, 1e6 / STEPS)
    rows = [
        (
            name,
            *(found[name] * scale for found, scale in zip(times, per_token, strict=True)),
            *(found[name] / found["Mamba-2"] for found in times),
        )
        for name in configs
    ]
    print(f"Microseconds per token, {seq} tokens (a step: after {seq} tokens):\n")
    names = ("forward", "both", "step")
    print_table(("", *names, *(f"{name} / Mamba-2" for name in names)), rows)


if __name__ == "__main__":
    main()
