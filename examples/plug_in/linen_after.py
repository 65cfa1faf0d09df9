"""A linen network learns digits, half of whose labels are wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from examples.plug_in import digits

STEPS = 500
train, validation, test, is_wrong = digits.load(noise=0.5)
train["index"] = np.arange(len(train["label"]))


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
    return solver.update(state, bf.Batch(*batch))


model, tx = MLP(), optax.adam(1e-3)
params = model.init(jax.random.key(0), train["image"][:1])["params"]
weights = bf.outer.sigmoid(len(train["label"]))
inner = lambda params, x, batch: (weights.apply(x, batch) * losses(params, batch)).mean()
outer = lambda params, x, batch: losses(params, batch).mean()
solver = bf.auto(bf.Problem(inner, outer, per_sample=True), inner=tx, steps=STEPS)
state = solver.init(params, weights.init())
for _, *batch in zip(range(STEPS), digits.batches(train), digits.batches(validation), strict=False):
    state, logs = train_step(state, batch)

predicted = jnp.argmax(jnp.asarray(model.apply({"params": state.params}, test["image"])), -1)
print(f"test error {np.mean(predicted != test['label']):.3f}")
print(f"wrong labels found, AUC {digits.found(weights.weights(state.outer_params), is_wrong):.3f}")
