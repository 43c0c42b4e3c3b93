# %% [markdown]
# # Load a model, generate, look inside
#
# The bundled model is a byte-level Mamba, trained on Shakespeare. A name of the Hugging Face Hub in
# place of `mbx.SHIPPED` loads a published model.

# %%
import jax.numpy as jnp
import jax.random as jr

import mamba_eqx as mbx
from mamba_eqx import inspection


model = mbx.from_pretrained(mbx.SHIPPED, dtype=jnp.float32)
tokenizer = mbx.load_tokenizer(mbx.SHIPPED)
print(mbx.summary(model, depth=2))

# %%
prompt = tokenizer.encode("ROMEO:")
out = mbx.generate(model, prompt, 64, mbx.Sampling(temperature=0.6), key=jr.key(0))
print(tokenizer.decode(out.tokens.tolist()))

# %% [markdown]
# Step sizes tell which tokens a layer ignores (small) and at which tokens it forgets (large):

# %%
text = "My horse, my horse!"
tokens = jnp.asarray(tokenizer.encode(text))
found = inspection.mixer_inputs(model, tokens)
path, mixer, x = found[4]
sizes = inspection.step_sizes(mixer, x).mean(axis=1)
for letter, size in zip(text, sizes, strict=True):
    print(f"{letter!r} {float(size):.3f} {'#' * int(400 * float(size))}")
assert (sizes > 0).all()
