"""Labels of the training examples: a learned row of logits for each.

x is a matrix [n, K] of logits, the label of example i is the distribution softmax(x_i), and

    ℓ_i(z, x_i) = -Σ_k softmax(x_i)_k log p_k(z; input_i)        x_ik = log P(k | given label)

at the start: the given label keeps 1 - noise, the other K - 1 share the rest. D_x of a row is the
slope of the example's log-probabilities along v, through softmax: as dear as for a weight.

Beware: K numbers for every training example are many. With a few hundred clean examples they can
be learned by heart through 20,000 rows (measured: `benchmarks/results/cleaning.md`), which weights,
one number in (0, 1), cannot. `recipes.clean` needs neither.

References:
    G. Algan, I. Ulusoy. Meta soft label generation for noisy labels. ICPR 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.checks import check_count


class SoftLabels(NamedTuple):
    """A parametrisation of per-sample labels.

    Attributes:
        init: `init()`, where x starts: logits float32 [n, classes].
        losses: `losses(rows, logits) -> [batch]`, the cross entropy of a network's `logits`
            [batch, classes] with the minibatch's labels; `rows` [batch, classes] is what a loss is
            handed in `outer_params`.
        labels: `labels(outer_params) -> [n, classes]`, the learned distributions.
        per_sample: what to pass as `Problem(per_sample=...)` for this leaf: True.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> soft = bf.outer.labels(np.array([2, 0]), num_classes=3, noise=0.3)
        >>> [round(float(p), 2) for p in soft.labels(soft.init())[0]]
        [0.15, 0.15, 0.7]
    """

    init: Callable[[], jax.Array]
    losses: Callable[[jax.Array, jax.Array], jax.Array]
    labels: Callable[[jax.Array], jax.Array]
    per_sample: bool = True


def labels(given: np.ndarray, num_classes: int, noise: float = 0.2) -> SoftLabels:
    """A row of label logits for every training example, started at the given label.

    Args:
        given: integers [n] in [0, num_classes), the labels as they are.
        num_classes: K, at least 2.
        noise: prior probability that a given label is wrong, in (0, 1).

    Raises:
        TypeError: `given` holds no integers.
        ValueError: a label or `noise` is out of range.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> soft = bf.outer.labels(np.array([2, 0]), num_classes=3, noise=0.2)
        >>> x = soft.init()
        >>> round(float(soft.labels(x)[1, 0]), 2), x.shape
        (0.8, (2, 3))
        >>> uniform = soft.losses(x, np.zeros((2, 3)))  # log 3, whatever the label
        >>> [round(float(loss), 3) for loss in uniform]
        [1.099, 1.099]
    """
    check_count("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2")
    if not 0 < noise < 1:
        raise ValueError(f"noise={noise} must lie in (0, 1): the share of wrong labels to expect")
    from bilevel_flax.data import check_labels  # nothing else of `outer` needs the data's room

    rows = check_labels(given, num_classes, "given")

    def init() -> jax.Array:
        right, other = jnp.log(1 - noise), jnp.log(noise / (num_classes - 1))
        return jnp.where(jax.nn.one_hot(rows, num_classes) > 0, right, other).astype(jnp.float32)

    def losses(outer_rows: jax.Array, logits: jax.Array) -> jax.Array:
        return -(jax.nn.softmax(outer_rows) * jax.nn.log_softmax(logits)).sum(-1)

    return SoftLabels(init, losses, jax.nn.softmax)
