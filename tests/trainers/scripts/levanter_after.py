"""A language model of named axes in Levanter."""

import equinox as eqx
import haliax as hax
import jax
import lm
import optax
from levanter.distributed import DistributedConfig, RayConfig
from levanter.tracker import NoopConfig
from levanter.trainer import TrainerConfig

import bilevel_flax as bf
from bilevel_flax.trainers import levanter, pairs

VOCAB, EMBED = hax.Axis("vocab", lm.VOCABULARY), hax.Axis("embed", 16)


class Model(eqx.Module):
    base: hax.NamedArray
    embed: hax.NamedArray

    def losses(self, batch):
        tokens = batch["tokens"]
        logits = self.embed.array.T[tokens[:, :-1]] @ self.base.array
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def inner_loss(model, x, batch, key=None):
    return (lm.MIXTURE.weights(x, batch) * model.losses(batch)).mean()


config = TrainerConfig(
    num_train_steps=lm.STEPS,
    train_batch_size=lm.BATCH,
    tracker=NoopConfig(),
    log_jaxprs=False,
    log_xla_hlo=False,
    require_accelerator=False,
    ray=RayConfig(auto_start_cluster=False),
    distributed=DistributedConfig(initialize_jax_distributed=False),
)
config.initialize()
keys = jax.random.split(jax.random.key(0))
model = Model(*(0.3 * hax.random.normal(key, (EMBED, VOCAB)) for key in keys))
train_stream, target_stream = lm.streams()
outer_loss = lambda model, x, batch, key: model.losses(batch).mean()
problem = levanter.problem(inner_loss, outer_loss, model)
solver = bf.auto(problem, inner=optax.adam(0.05), steps=lm.STEPS)
with levanter.Trainer(config, solver, lm.MIXTURE.init()) as trainer:
    state = trainer.initial_state(jax.random.PRNGKey(0), model=model)
    info = trainer.train(state, pairs(train_stream, target_stream))
