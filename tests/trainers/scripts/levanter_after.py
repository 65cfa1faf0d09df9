"""A language model in Levanter."""

from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
import lm
import optax
from levanter.checkpoint import CheckpointerConfig
from levanter.distributed import DistributedConfig, RayConfig
from levanter.tracker import NoopConfig
from levanter.trainer import TrainerConfig

import bilevel_flax as bf
from bilevel_flax.trainers import levanter, pairs

VOCAB, EMBED = hax.Axis("vocab", lm.VOCABULARY), hax.Axis("embed", 16)


class Model(eqx.Module):
    embed: hax.NamedArray
    out: hax.NamedArray

    @staticmethod
    def init(key):
        keys = jax.random.split(key)
        draw = lambda key: hax.random.normal(key, (EMBED, VOCAB)) * 0.3
        return Model(draw(keys[0]), draw(keys[1]))


def named(stream):
    for batch in stream:
        tokens = hax.named(batch["tokens"], ("batch", "position"))
        yield {"tokens": tokens, "domain": hax.named(batch["domain"], "batch")}


def losses(model, batch):
    tokens = batch["tokens"].array
    logits = model.embed.array.T[tokens[:, :-1]] @ model.out.array
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def inner_loss(model, x, batch, key):
    weights = lm.MIXTURE.weights(x, {"domain": batch["domain"].array})
    return (weights * losses(model, batch)).mean()


config = TrainerConfig(
    id="run",
    num_train_steps=lm.STEPS,
    train_batch_size=lm.BATCH,
    tracker=NoopConfig(),
    log_dir=Path("logs"),
    require_accelerator=False,
    ray=RayConfig(auto_start_cluster=False),
    distributed=DistributedConfig(initialize_jax_distributed=False),
    checkpointer=CheckpointerConfig(base_path="checkpoints"),
)
config.initialize()
model = Model.init(jax.random.key(0))
outer_loss = lambda model, x, batch, key: losses(model, batch).mean()
problem = levanter.problem(inner_loss, outer_loss, model)
solver = bf.auto(problem, inner=optax.adam(0.05), steps=lm.STEPS)
train_stream, target_stream = map(named, lm.streams())
with levanter.Trainer(config, solver, lm.MIXTURE.init()) as trainer:
    state = trainer.initial_state(jax.random.key(0), model=model)
    state = trainer.train(state, pairs(train_stream, target_stream)).state
