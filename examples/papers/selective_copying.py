"""Selective copying, from the Mamba paper: section 4.1.1 and table 1.

    python examples/papers/selective_copying.py

A sequence of noise tokens contains a few data tokens at random places. At the end the model must
repeat the data in order. A time-invariant layer cannot tell data from noise; a selective one can.
The Mamba-1 layer is therefore trained unchanged, without selection (B, C and dt are learned but do
not depend on the input), and both with and without its gate.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _common import (
    Example,
    Sample,
    accuracy_of,
    arguments,
    mixer_config,
    options,
    record,
    report,
    size,
    train,
)
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import mamba_eqx as mbx


VOCAB = 16
NOISE, ASK = 0, 1  # The other tokens are data.
NAMES = {
    "mamba1": "Mamba-1: selective, gated",
    "mamba1 -gate": "Mamba-1 without its gate",
    "mamba1 -selection": "Mamba-1 without selection",
    "mamba1 -selection -gate": "Mamba-1 without either",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
}


class Ablated(mbx.AbstractSequenceLayer[mbx.Mamba1State]):
    """A `Mamba1` whose selection and gate are optional.

    Without selection, `dt`, `B` and `C` are learned constants. Without the gate, the output of the
    scan goes through a GELU.
    """

    mamba: mbx.Mamba1
    B: Float[Array, " d_state"]
    C: Float[Array, " d_state"]
    d_model: int = eqx.field(static=True)
    selective: bool = eqx.field(static=True)
    gated: bool = eqx.field(static=True)

    def __init__(self, mamba: mbx.Mamba1, selective: bool, gated: bool, key: PRNGKeyArray):
        B_key, C_key = jr.split(key)
        self.mamba, self.d_model = mamba, mamba.d_model
        self.B = jr.normal(B_key, (mamba.d_state,))
        self.C = jr.normal(C_key, (mamba.d_state,))
        self.selective, self.gated = selective, gated

    def init_state(self, *, max_len: int | None = None) -> mbx.Mamba1State:
        return self.mamba.init_state()

    def scan(
        self,
        x: Float[Array, "seq d_model"],
        state: mbx.Mamba1State | None = None,
        *,
        reset: Bool[Array, " seq"] | None = None,
        length: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "seq d_model"], mbx.Mamba1State]:
        mamba, state = self.mamba, self.init_state() if state is None else state
        u, z = jnp.split(mamba.in_proj(x), 2, axis=-1)
        u, conv = mamba.conv1d.scan(u, state.conv, reset=reset, length=length)
        u = jax.nn.silu(u)
        dt, B, C = self._select(u)
        y, ssm = mbx.ops.selective_scan(
            u, dt, mamba.A, B, C, mamba.D, state=state.ssm, reset=reset, length=length
        )
        return self._emit(y, z), mbx.Mamba1State(conv, ssm)

    def step(
        self, x: Float[Array, " d_model"], state: mbx.Mamba1State
    ) -> tuple[Float[Array, " d_model"], mbx.Mamba1State]:
        mamba = self.mamba
        u, z = jnp.split(mamba.in_proj(x), 2, axis=-1)
        u, conv = mamba.conv1d.step(u, state.conv)
        u = jax.nn.silu(u)
        dt, B, C = self._select(u)
        y, ssm = mbx.ops.selective_scan_step(u, dt, mamba.A, B, C, mamba.D, state=state.ssm)
        return self._emit(y, z), mbx.Mamba1State(conv, ssm)

    def _select(self, u: Float[Array, "*seq d_inner"]) -> tuple[Array, Array, Array]:
        mamba, seq = self.mamba, u.shape[:-1]
        if not self.selective:
            dt = jnp.broadcast_to(jax.nn.softplus(mamba.dt_bias), u.shape)
            B, C = (jnp.broadcast_to(t, (*seq, mamba.d_state)) for t in (self.B, self.C))
            return dt, B, C
        sizes = [mamba.dt_rank, mamba.dt_rank + mamba.d_state]
        dt, B, C = jnp.split(mamba.x_proj(u), sizes, axis=-1)
        return jax.nn.softplus(mamba.dt_proj(dt) + mamba.dt_bias), B, C

    def _emit(
        self, y: Float[Array, "*seq d_inner"], z: Float[Array, "*seq d_inner"]
    ) -> Float[Array, "*seq d_model"]:
        return self.mamba.out_proj(y * jax.nn.silu(z) if self.gated else jax.nn.gelu(y))


def task(length: int, data: int) -> Sample:
    """Returns a task of `data` tokens among `length`, followed by `data` queries."""

    def sample(key: PRNGKeyArray) -> Example:
        place_key, token_key = jr.split(key)
        places = jnp.sort(jr.choice(place_key, length, (data,), replace=False))
        tokens = jr.randint(token_key, (data,), ASK + 1, VOCAB)
        text = jnp.full(length, NOISE).at[places].set(tokens)
        text = jnp.concatenate([text, jnp.full(data, ASK)])
        targets = jnp.concatenate([jnp.zeros(length, jnp.int32), tokens])
        return Example(text, targets, (text == ASK).astype(jnp.float32))

    return sample


def make(name: str, d_model: int, d_state: int, key: PRNGKeyArray) -> mbx.LanguageModel:
    kind, *without = name.split(" -")

    def mixer(key: PRNGKeyArray) -> mbx.AbstractSequenceLayer[Any]:
        mixer = mixer_config(kind, d_model, d_state).build(key=key)
        if not without:
            return mixer
        selective, gated = "selection" not in without, "gate" not in without
        assert isinstance(mixer, mbx.Mamba1), name
        return Ablated(mixer, selective, gated, jr.fold_in(key, 1))

    model_key, *keys = jr.split(key, 3)
    layers = mbx.Unrolled([mbx.Block(mixer(k)) for k in keys])
    return mbx.LanguageModel(layers, vocab_size=VOCAB, key=model_key)


def plot(runs: list[dict[str, Any]]) -> Any:
    """Plots the accuracy during training."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2))
    for i, (name, label) in enumerate(NAMES.items()):
        for n, run in enumerate(r for r in runs if r["model"] == name):
            steps, accuracies = zip(
                *[(p["step"], p["accuracy"]) for p in run["curve"]], strict=True
            )
            axes.plot(steps, accuracies, color=f"C{i}", label=None if n else label)
    axes.set(xlabel="training step", ylabel="accuracy of a token", ylim=(-0.03, 1.03))
    return figure


def main() -> None:
    args = arguments(
        __doc__,
        models=list(NAMES),
        seeds=[0],
        length=64,
        data=4,
        d_model=64,
        d_state=16,
        steps=1500,
        batch=16,
        lr=5e-3,
    )
    if args.smoke:
        args.models, args.length, args.data = ["mamba1 -selection -gate"], 8, 2
        args.d_model, args.steps, args.batch = 16, 2, 2
    path = args.out / "selective_copying.jsonl"
    runs = [] if args.plot_only else [(name, s) for s in args.seeds for name in args.models]
    sample = task(args.length, args.data)
    for name, seed in runs:
        model_key, data_key, test_key = jr.split(jr.key(seed), 3)
        model = make(name, args.d_model, args.d_state, model_key)
        model, curve, minutes = train(
            model, [(sample, args.steps)], lr=args.lr, batch=args.batch, key=data_key, label=name
        )
        accuracy = accuracy_of(model, sample, batch=args.batch, batches=32, key=test_key)
        print(f"{name}, seed {seed}: {accuracy:.4f} of the tokens of fresh sequences", flush=True)
        run = {"model": name, "seed": seed, "accuracy": accuracy, "parameters": size(model)}
        run |= options(args, "length", "data", "d_model", "d_state", "steps", "batch", "lr")
        run |= {"minutes": minutes, "curve": curve}
        record(path, run, same=("model", "seed"))
    report(path, plot)


if __name__ == "__main__":
    main()
