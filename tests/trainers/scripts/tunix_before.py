"""LoRA on a language model, in Tunix."""

import lm
import optax
from flax import nnx
from tunix.sft import peft_trainer


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


def inner_loss(model, tokens, domain):
    return losses(model, tokens).mean()


model = Model(nnx.Rngs(0))
config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=lm.STEPS)
optimizer = optax.adam(0.05)
trainer = peft_trainer.PeftTrainer(model, optimizer, config)
trainer.with_loss_fn(inner_loss)
train_stream, target_stream = lm.streams()
trainer.train(train_stream)
