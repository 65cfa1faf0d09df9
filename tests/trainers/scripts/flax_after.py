"""A language model in a Flax TrainState."""

import jax
import jax.numpy as jnp
import lm
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import bilevel_flax as bf
from bilevel_flax.trainers import flax, pairs, solver_optimizer

model = nn.Sequential([nn.Embed(lm.VOCABULARY, 16), nn.Dense(lm.VOCABULARY)])


def losses(params, batch):
    logits = model.apply({"params": params}, batch["tokens"][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean(-1)


def inner_loss(params, x, batch):
    return (lm.MIXTURE.weights(x, batch) * losses(params, batch)).mean()


@jax.jit
def train_step(state, batch):
    return flax.apply_batch(state, bf.Batch(batch["inner"], batch["outer"]))


params = model.init(jax.random.key(0), jnp.zeros((1, lm.LENGTH), jnp.int32))["params"]
problem = bf.Problem(inner_loss, lambda params, x, batch: losses(params, batch).mean())
solver = bf.auto(problem, inner=optax.adam(0.05), steps=lm.STEPS)
tx = solver_optimizer(solver, lm.MIXTURE.init())
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
train_stream, target_stream = lm.streams()
for _, batch in zip(range(lm.STEPS), pairs(train_stream, target_stream), strict=False):
    state, info = train_step(state, batch)
