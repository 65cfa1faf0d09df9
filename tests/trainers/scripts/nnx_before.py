"""A language model in an NNX optimiser."""

import lm
import optax
from flax import nnx

rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Embed(lm.VOCABULARY, 16, rngs=rngs), nnx.Linear(16, lm.VOCABULARY, rngs=rngs)
)


def losses(model, batch):
    logits = model(batch["tokens"][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean(-1)


def inner_loss(model, batch):
    return losses(model, batch).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(inner_loss)(model, batch)
    optimizer.update(model, grads)
    return loss


tx = optax.adam(0.05)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
train_stream, target_stream = lm.streams()
for _, batch in zip(range(lm.STEPS), train_stream, strict=False):
    loss = train_step(model, optimizer, batch)
