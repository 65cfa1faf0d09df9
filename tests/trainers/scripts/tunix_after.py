"""LoRA on a language model, in Tunix."""

import lm
import optax
from flax import nnx
from tunix.sft import peft_trainer

import bilevel_flax as bf
from bilevel_flax.trainers import pairs
from bilevel_flax.trainers.tunix import PeftTrainer


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(lm.VOCABULARY, 16, rngs=rngs)
        base = nnx.Linear(16, lm.VOCABULARY, rngs=rngs)
        self.out = nnx.LoRA(16, 4, lm.VOCABULARY, base_module=base, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.embed(tokens))


def losses(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def inner_loss(model, x, batch):
    return (lm.MIXTURE.weights(x, batch) * losses(model, batch["tokens"])).mean()


model, x = Model(nnx.Rngs(0)), lm.MIXTURE.init()
config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=lm.STEPS)
outer_loss = lambda model, x, batch: losses(model, batch["tokens"]).mean()
problem = bf.nnx.problem(inner_loss, outer_loss, model, x, wrt=nnx.LoRAParam)
trainer = PeftTrainer(model, bf.auto(problem, inner=optax.adam(0.05), steps=lm.STEPS), x, config)
train_stream, target_stream = lm.streams()
trainer.train(pairs(train_stream, target_stream))
