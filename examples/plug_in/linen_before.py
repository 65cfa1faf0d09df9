"""A linen network learns digits, half of whose labels are wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from examples.plug_in import digits

STEPS = 500
train, validation, test, is_wrong = digits.load(noise=0.5)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(128)(images.reshape(len(images), -1)))
        return nn.Dense(digits.NUM_CLASSES)(hidden)


def losses(params, batch):
    logits = jnp.asarray(model.apply({"params": params}, batch["image"]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


@jax.jit
def train_step(state, batch):
    loss, grads = jax.value_and_grad(lambda params: losses(params, batch).mean())(state.params)
    return state.apply_gradients(grads=grads), loss


model, tx = MLP(), optax.adam(1e-3)
params = model.init(jax.random.key(0), train["image"][:1])["params"]
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
for _, batch in zip(range(STEPS), digits.batches(train), strict=False):
    state, logs = train_step(state, batch)

predicted = jnp.argmax(jnp.asarray(model.apply({"params": state.params}, test["image"])), -1)
print(f"test error {np.mean(predicted != test['label']):.3f}")
