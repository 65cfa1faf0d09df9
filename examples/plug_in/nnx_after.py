"""An NNX network with BatchNorm and dropout learns digits, half of whose labels are wrong."""

import numpy as np
import optax
from flax import nnx

import bilevel_flax as bf
from examples.plug_in import digits

STEPS = 500
train, validation, test, is_wrong = digits.load(noise=0.5)
train["index"] = np.arange(len(train["label"]))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(16 * 4 * 4, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.out = nnx.Linear(64, digits.NUM_CLASSES, rngs=rngs)

    def __call__(self, images):
        features = nnx.relu(self.norm(self.conv(images)))
        hidden = nnx.relu(self.hidden(features.reshape(len(images), -1)))
        return self.out(self.dropout(hidden))


def losses(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])


@nnx.jit
def train_step(model, optimizer, batch):
    return optimizer.update(model, bf.Batch(*batch))


model, tx = CNN(nnx.Rngs(0)), optax.adam(1e-3)
weights = bf.outer.sigmoid(len(train["label"]))
inner = lambda model, x, batch: (weights.apply(x, batch) * losses(model, batch)).mean()
outer = lambda model, x, batch: losses(model, batch).mean()
problem = bf.nnx.problem(inner, outer, model, weights.init(), per_sample=True)
optimizer = bf.nnx.Optimizer(model, bf.auto(problem, inner=tx, steps=STEPS), weights.init())
for _, *batch in zip(range(STEPS), digits.batches(train), digits.batches(validation), strict=False):
    logs = train_step(model, optimizer, batch)

model.eval()
predicted = model(test["image"]).argmax(-1)
print(f"test error {np.mean(predicted != test['label']):.3f}")
print(f"wrong labels found, AUC {digits.found(weights.weights(optimizer.outer), is_wrong):.3f}")
