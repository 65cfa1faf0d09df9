"""A language model in Kauldron."""

import jax
import lm
import numpy as np
import optax
from flax import linen as nn
from kauldron import kd


class Model(nn.Module):
    tokens: kd.kontext.Key = "batch.tokens"

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(lm.VOCABULARY, 16)(tokens[:, :-1])
        return nn.Dense(lm.VOCABULARY)(x)


def losses(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


class Nats(kd.losses.Loss):
    logits: kd.kontext.Key = "preds"
    tokens: kd.kontext.Key = "batch.tokens"

    def get_values(self, logits, tokens):
        return losses(logits, tokens)


class Source:
    def __init__(self):
        train_stream, target_stream = lm.streams()
        batches = [next(train_stream) for _ in range(lm.STEPS)]
        self.rows = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def __len__(self):
        return lm.STEPS * lm.BATCH

    def __getitem__(self, i):
        return jax.tree.map(lambda leaf: leaf[i], self.rows)


trainer = kd.train.Trainer(
    seed=0,
    workdir="run",
    train_ds=kd.data.py.DataSource(
        data_source=Source(), batch_size=lm.BATCH, shuffle=False, num_workers=0
    ),
    model=Model(),
    num_train_steps=lm.STEPS,
    train_losses={"nats": Nats()},
    optimizer=optax.adam(0.05),
)
state, _ = trainer.train()
