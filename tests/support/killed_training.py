"""The training run that test_killed_training.py kills: `killed_training.py FOLDER [slow]`.

With `slow` it waits for a minute in the middle of writing each checkpoint, so that it can be killed
there.
"""

import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mamba_eqx import training
from mamba_eqx.training import _checkpoints


TEXT = np.random.default_rng(0).integers(0, 8, 500).astype(np.uint8)
STEPS = 50


def main(folder: str, slow: bool = False) -> None:
    def loss_of(weight, batch, noise):
        log_probs = jax.nn.log_softmax(weight[batch.tokens] + noise)
        return -jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1).mean()

    @jax.jit
    def jitted(state, batch):
        key, noise_key = jr.split(state["key"])
        noise = 0.1 * jr.normal(noise_key, (8,))
        loss, grads = jax.value_and_grad(loss_of)(state["weight"], batch, noise)
        momentum = 0.9 * state["momentum"] + grads
        weight = state["weight"] - 0.1 * momentum
        return {"weight": weight, "momentum": momentum, "key": key}, {"loss": loss}

    def step(state, batch):
        time.sleep(0.005)
        return jitted(state, batch)

    def evaluate(state):
        return {"size": np.abs(state["weight"]).sum()}

    if slow:
        write = _checkpoints.write_safetensors

        def write_and_wait(path, tensors, metadata):
            write(path, tensors, metadata)
            time.sleep(60)

        _checkpoints.write_safetensors = write_and_wait

    state = {"weight": jnp.zeros((8, 8)), "momentum": jnp.zeros((8, 8)), "key": jr.key(1)}
    training.fit(
        step,
        state,
        training.Streams(TEXT, batch=3, length=10, stretch=4, separator=0),
        steps=STEPS,
        folder=folder,
        config={"seed": 1},
        checkpoint_every=7,
        evaluate=evaluate,
        evaluate_every=10,
        best="size",
        log_every=4,
        progress=False,
    )


if __name__ == "__main__":
    main(sys.argv[1], slow=sys.argv[2:] == ["slow"])
