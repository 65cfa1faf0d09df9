"""A language model of named axes in Levanter."""

import equinox as eqx
import haliax as hax
import jax
import lm
import optax
from levanter.distributed import DistributedConfig, RayConfig
from levanter.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

VOCAB, EMBED = hax.Axis("vocab", lm.VOCABULARY), hax.Axis("embed", 16)


class Model(eqx.Module):
    base: hax.NamedArray
    embed: hax.NamedArray

    def losses(self, batch):
        tokens = batch["tokens"]
        logits = self.embed.array.T[tokens[:, :-1]] @ self.base.array
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def inner_loss(model, batch, key=None):
    return hax.named(model.losses(batch), "batch").mean()


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
with Trainer(config, optax.adam(0.05), inner_loss) as trainer:
    state = trainer.initial_state(jax.random.PRNGKey(0), model=model)
    info = trainer.train(state, train_stream)
