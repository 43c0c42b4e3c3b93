"""Trains a recurrent policy by policy gradients on a task that requires memory.

    python examples/policy.py

An episode is a corridor. Its first step shows a colour, the following steps show walls only, and at
the junction the agent must turn to the side of the colour. Corridors differ in length, and each
starts where the previous one ended. The policy acts by `layer.step`, one step at a time inside a
`lax.scan`, and its state is reset at the end of an episode. The update runs the whole trajectory at
once by `layer.scan` with `reset`. Both compute the same function, and the script prints by how much
they differ.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import PyTree
from option_types import number

import mamba_eqx as mbx


FEATURES = 4  # Left colour, right colour, wall, junction.
DISCOUNT = 0.5
ENTROPY = 0.02  # Weight of the entropy bonus, without which the policy settles too early.


class Corridor(eqx.Module):
    """The state of the environment. `at` counts from 0, and the junction is at `length`."""

    colour: jax.Array
    length: jax.Array
    at: jax.Array


def begin(key: jax.Array, longest: int) -> Corridor:
    """Returns the start of a new corridor with a random colour and length."""
    colour_key, length_key = jr.split(key)
    return Corridor(
        jr.randint(colour_key, (), 0, 2),
        jr.randint(length_key, (), max(1, longest // 2), longest + 1),
        jnp.zeros((), jnp.int32),
    )


def observe(env: Corridor) -> jax.Array:
    """Returns the features that the agent sees, of shape `(FEATURES,)`."""
    seen = jnp.where(env.at == 0, env.colour, jnp.where(env.at == env.length, 3, 2))
    return jax.nn.one_hot(seen, FEATURES)


def act(
    env: Corridor, action: jax.Array, key: jax.Array, longest: int
) -> tuple[Corridor, jax.Array, jax.Array]:
    """Returns the next state, the reward, and whether the episode has ended."""
    done = env.at == env.length
    reward = jnp.where(done, jnp.where(action == env.colour, 1.0, -1.0), 0.0)
    further = eqx.tree_at(lambda env: env.at, env, env.at + 1)
    fresh = begin(key, longest)
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, further), reward, done


class Policy(eqx.Module):
    """A recurrent policy, which returns the log-probabilities of turning left and right."""

    encoder: eqx.nn.Linear
    block: mbx.Block
    head: eqx.nn.Linear

    def __init__(self, d_model: int, *, key: jax.Array):
        keys = jr.split(key, 3)
        self.encoder = eqx.nn.Linear(FEATURES, d_model, key=keys[0])
        self.block = mbx.Block(mbx.Mamba1(d_model, d_state=8, key=keys[1]))
        self.head = eqx.nn.Linear(d_model, 2, key=keys[2])

    def step(self, seen: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        """Acts on one observation."""
        y, state = self.block.step(self.encoder(seen), state)
        return jax.nn.log_softmax(self.head(y)), state

    def scan(self, seen: jax.Array, state: PyTree, reset: jax.Array) -> jax.Array:
        """Acts on a whole trajectory. `reset` is true where an episode starts."""
        y, _ = self.block.scan(jax.vmap(self.encoder)(seen), state, reset=reset)
        return jax.nn.log_softmax(jax.vmap(self.head)(y))


class Trajectory(eqx.Module):
    """The steps of one agent, with a first axis of steps."""

    seen: jax.Array
    actions: jax.Array
    log_probs: jax.Array
    rewards: jax.Array
    reset: jax.Array  # Whether an episode started at the step.


Carry = tuple[Corridor, PyTree]
"""The environment and the state of the policy."""


def rollout(
    policy: Policy, env: Corridor, state: PyTree, key: jax.Array, steps: int, longest: int
) -> tuple[Carry, Trajectory]:
    """Acts for a number of steps and returns the last environment and state, and the trajectory."""
    empty = policy.block.init_state()

    def one(carry: Carry, key: jax.Array) -> tuple[Carry, Trajectory]:
        env, state = carry
        reset, seen = env.at == 0, observe(env)
        state = jax.tree.map(lambda new, old: jnp.where(reset, new, old), empty, state)
        log_probs, state = policy.step(seen, state)
        action_key, env_key = jr.split(key)
        action = jr.categorical(action_key, log_probs)
        env, reward, _ = act(env, action, env_key, longest)
        return (env, state), Trajectory(seen, action, log_probs, reward, reset)

    return lax.scan(one, (env, state), jr.split(key, steps))


def returns_of(rewards: jax.Array) -> jax.Array:
    """Computes the discounted return at each step.

    The return is the reward at the end of the episode, times `DISCOUNT` for each step until then.
    It is zero if the trajectory does not contain the end.
    """

    def back(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = jnp.where(reward != 0, reward, DISCOUNT * later)
        return value, value

    return lax.scan(back, jnp.zeros(()), rewards, reverse=True)[1]


@eqx.filter_jit
def update(
    optimiser: optax.GradientTransformation,
    policy: Policy,
    opt_state: optax.OptState,
    carry: Carry,
    keys: jax.Array,
    steps: int,
    longest: int,
) -> tuple[Policy, optax.OptState, Carry, tuple[jax.Array, jax.Array]]:
    """Acts with the policy and improves it by one policy gradient.

    Returns the new policy and optimiser state, the last environments and states, and two measures:
    the share of correct turns, and the largest difference between `step` and `scan`.
    """
    start = carry[1]
    run = lambda env, state, key: rollout(policy, env, state, key, steps, longest)
    carry, seen = jax.vmap(run)(*carry, keys)
    values = jax.vmap(returns_of)(seen.rewards)

    def loss_of(policy: Policy) -> tuple[jax.Array, jax.Array]:
        again = jax.vmap(policy.scan)(seen.seen, start, seen.reset)
        chosen = jnp.take_along_axis(again, seen.actions[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(again) * again, axis=-1)
        apart = jnp.max(jnp.abs(again - seen.log_probs))
        return -jnp.mean(values * chosen + ENTROPY * entropy), apart

    grads, apart = eqx.filter_grad(loss_of, has_aux=True)(policy)
    updates, opt_state = optimiser.update(grads, opt_state)
    ends = seen.rewards != 0
    right = jnp.sum(seen.rewards > 0) / jnp.maximum(1, jnp.sum(ends))
    return eqx.apply_updates(policy, updates), opt_state, carry, (right, apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--longest", type=number(int, 1), default=12, help="maximum length of a corridor"
    )
    parser.add_argument("--d-model", type=number(int, 1), default=16)
    parser.add_argument("--updates", type=number(int, 1), default=150)
    parser.add_argument(
        "--agents", type=number(int, 1), default=32, help="number of parallel agents"
    )
    parser.add_argument(
        "--steps", type=number(int, 1), default=48, help="steps of each agent per update"
    )
    parser.add_argument("--lr", type=number(float, 0), default=5e-3)
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    mbx.use_compilation_cache()

    policy_key, env_key, key = jr.split(jr.key(args.seed), 3)
    policy = Policy(args.d_model, key=policy_key)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.lr))
    opt_state = optimiser.init(eqx.filter(policy, eqx.is_array))
    envs = jax.vmap(lambda key: begin(key, args.longest))(jr.split(env_key, args.agents))
    states = jax.vmap(lambda _: policy.block.init_state())(envs.at)
    carry, rights, aparts = (envs, states), [], []
    start = time.process_time()
    for i in range(1, args.updates + 1):
        keys = jr.split(jr.fold_in(key, i), args.agents)
        policy, opt_state, carry, (right, apart) = update(
            optimiser, policy, opt_state, carry, keys, args.steps, args.longest
        )
        rights.append(float(right))
        aparts.append(float(apart))
        if i % 50 == 0 or i == args.updates:
            recent = np.mean(rights[-20:])
            print(f"update {i}: {recent:.1%} of recent turns were correct", flush=True)
    print(f"chance is 50%; {time.process_time() - start:.0f} s of CPU time")
    print(f"step and scan: log-probabilities differ by at most {max(aparts):.1e}")


if __name__ == "__main__":
    main()
