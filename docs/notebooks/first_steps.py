# %% [markdown]
# # First steps
#
# A sequence layer is a causal map with three ways to run it: a whole sequence, a piece of a
# sequence from a state, or one token.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import mamba_eqx as mbx


layer = mbx.Mamba1(8, d_state=4, key=jr.key(0))
x = jr.normal(jr.key(1), (12, 8))  # (seq, d_model): one sequence, without a batch axis
run, scan, step = eqx.filter_jit(layer), eqx.filter_jit(layer.scan), eqx.filter_jit(layer.step)

# %% [markdown]
# All three compute the same function:

# %%
whole = run(x)
first, state = scan(x[:11])
last, state = step(x[11], state)
assert jnp.allclose(whole, jnp.concatenate([first, last[None]]), atol=1e-5)
print(jax.tree.map(jnp.shape, state))

# %% [markdown]
# A state is a value. Continue the same past in two ways:

# %%
futures = jr.normal(jr.key(2), (2, 8))
outputs, states = jax.vmap(layer.step, in_axes=(0, None))(futures, state)
print(outputs.shape)

# %% [markdown]
# A layer in a model of your own, over a batch:


# %%
class Classifier(eqx.Module):
    block: mbx.Block
    head: eqx.nn.Linear

    def __call__(self, x):
        return self.head(self.block(x).mean(axis=0))


classifier = Classifier(mbx.Block(layer), eqx.nn.Linear(8, 3, key=jr.key(3)))
batch = jr.normal(jr.key(4), (5, 12, 8))
logits = eqx.filter_jit(eqx.filter_vmap(classifier))(batch)
assert logits.shape == (5, 3)
