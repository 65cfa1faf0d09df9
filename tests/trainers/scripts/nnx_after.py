"""A language model in an NNX optimiser."""

import lm
import optax
from flax import nnx

import bilevel_flax as bf
from bilevel_flax.trainers import nnx as bilevel_nnx
from bilevel_flax.trainers import pairs, solver_optimizer

rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Embed(lm.VOCABULARY, 16, rngs=rngs), nnx.Linear(16, lm.VOCABULARY, rngs=rngs)
)


def losses(model, batch):
    logits = model(batch["tokens"][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:]).mean(-1)


def inner_loss(model, x, batch):
    return (lm.MIXTURE.weights(x, batch) * losses(model, batch)).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    return bilevel_nnx.update(model, optimizer, bf.Batch(batch["inner"], batch["outer"]))


outer_loss = lambda model, x, batch: losses(model, batch).mean()
problem = bf.nnx.problem(inner_loss, outer_loss, model, lm.MIXTURE.init())
solver = bf.auto(problem, inner=optax.adam(0.05), steps=lm.STEPS)
tx = solver_optimizer(solver, lm.MIXTURE.init())
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
train_stream, target_stream = lm.streams()
for _, batch in zip(range(lm.STEPS), pairs(train_stream, target_stream), strict=False):
    info = train_step(model, optimizer, batch)
