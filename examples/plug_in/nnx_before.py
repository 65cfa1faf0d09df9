"""An NNX network with BatchNorm and dropout learns digits, half of whose labels are wrong."""

import numpy as np
import optax
from flax import nnx

from examples.plug_in import digits

STEPS = 500
train, validation, test, is_wrong = digits.load(noise=0.5)


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
    loss, grads = nnx.value_and_grad(lambda model: losses(model, batch).mean())(model)
    optimizer.update(model, grads)
    return loss


model, tx = CNN(nnx.Rngs(0)), optax.adam(1e-3)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
for _, batch in zip(range(STEPS), digits.batches(train), strict=False):
    logs = train_step(model, optimizer, batch)

model.eval()
predicted = model(test["image"]).argmax(-1)
print(f"test error {np.mean(predicted != test['label']):.3f}")
