"""A language model in a Flax TrainState."""

import jax
import jax.numpy as jnp
import lm
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

model = nn.Sequential([nn.Embed(lm.VOCABULARY, 16), nn.Dense(lm.VOCABULARY)])


def losses(params, batch):
    logits = model.apply({"params": params}, batch["tokens"][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean(-1)


def inner_loss(params, batch):
    return losses(params, batch).mean()


@jax.jit
def train_step(state, batch):
    loss, grads = jax.value_and_grad(inner_loss)(state.params, batch)
    return state.apply_gradients(grads=grads), loss


params = model.init(jax.random.key(0), jnp.zeros((1, lm.LENGTH), jnp.int32))["params"]
tx = optax.adam(0.05)
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
train_stream, target_stream = lm.streams()
for _, batch in zip(range(lm.STEPS), train_stream, strict=False):
    state, loss = train_step(state, batch)
