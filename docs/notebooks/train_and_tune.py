# %% [markdown]
# # Train a model, then fine-tune it
#
# A small language model learns a text by heart, and a low-rank change of its weights (LoRA) another
# one. On a real text, use `training.fit` and the data of `training.Streams`.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import mamba_eqx as mbx
from mamba_eqx import training


tokenizer = mbx.ByteTokenizer()
block = mbx.BlockConfig(mbx.Mamba1Config(32, d_state=4))
model = mbx.LanguageModelConfig(256, (block,)).build(key=jr.key(0))


def batch_of(text):
    tokens = jnp.asarray(tokenizer.encode(text))[None]
    flags = jnp.zeros((1, tokens.shape[1] - 1), bool)
    return training.Batch(tokens[:, :-1], tokens[:, 1:], reset=flags, mask=~flags)


# %%
batch = batch_of("To be, or not to be: that is the question.")
step = training.TrainStep(optax.adam(1e-2))
state = step.init(model, key=jr.key(1))
losses = []
for _ in range(60):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
print(f"{losses[0]:.2f} nats per byte at first, {losses[-1]:.2f} at the end")
assert losses[-1] < 0.5 * losses[0]

# %% [markdown]
# Fine-tuning: only the pairs of small matrices are trained.

# %%
lora = training.LoRA.init(state.model, rank=4, key=jr.key(2))
optimiser = optax.adam(1e-2)
opt_state = optimiser.init(lora)
other = batch_of("To be, or not to be: nobody asks that here.")


@jax.jit
def tune(lora, opt_state, model):
    def loss(lora):
        return training.next_token_loss(lora.merge(model), other)[0]

    value, grads = jax.value_and_grad(loss)(lora)
    updates, opt_state = optimiser.update(grads, opt_state, lora)
    return eqx.apply_updates(lora, updates), opt_state, value


values = []
for _ in range(20):
    lora, opt_state, value = tune(lora, opt_state, state.model)
    values.append(float(value))
tuned = lora.merge(state.model)
assert values[-1] < values[0]

# %%
out = mbx.generate(tuned, tokenizer.encode("To be"), 20)
print(tokenizer.decode(out.tokens.tolist()))
