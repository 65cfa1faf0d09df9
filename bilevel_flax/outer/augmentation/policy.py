"""A policy of augmentations as outer parameters: how much of each operation, and how often.

For each operation k, x holds a logit of its magnitude and one of its probability, for all classes
together (DADA) or for each class (CADDA):

    m_k = limit_k σ(x_k)        p_k = σ(y_k)        amount of an example = g m_k u

with u uniform in [-1, 1] (in [0, 1] where only one direction makes sense) and g a relaxed
Bernoulli draw of probability p_k, g = σ((y_k - logit q) / τ) with q uniform, differentiable in y_k.
An amount of 0 changes nothing, so g is between "not applied" and "applied", nearly always at one of
its ends; τ -> 0 is the plain Bernoulli draw. Nothing else is relaxed: with soft draws D_x is the
derivative of what is computed, but for the surrogates of posterize and solarize.

References:
    Y. Li, G. Hu, Y. Wang, T. Hospedales, N. M. Robertson, Y. Yang. DADA: differentiable automatic
    data augmentation. ECCV 2020.
    C. Rommel, T. Moreau, J. Paillard, A. Gramfort. CADDA: class-wise automatic differentiable data
    augmentation for EEG signals. ICLR 2022.
    G. Benton, M. Finzi, P. Izmailov, A. G. Wilson. Learning invariances in neural networks from
    training data. NeurIPS 2020 (uniform amounts whose range is learned).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import PyTree
from bilevel_flax.checks import check_count
from bilevel_flax.outer.augmentation.operation import Draws, Operation, draw
from bilevel_flax.tree import rows_at

# A fraction of exactly 0 or 1 has no finite logit.
_ALMOST = 1e-6


@dataclasses.dataclass(frozen=True)
class Policy:
    """Augmentations with magnitudes and probabilities that can be learned.

    Made by `image_policy` or `signal_policy` (kinds.py).

    Attributes:
        operations: in the order in which they are applied.
        limits: the largest magnitude of each, in its unit.
        num_classes: magnitudes and probabilities for each class; None: for all together.
        magnitude: where all start, as a fraction of the limits, in (0, 1).
        probability: where all start, in (0, 1).
        temperature: τ > 0.
        hard: draw g from {0, 1}, with the derivative of the soft draw (straight-through).
        rank: of a batch of examples.
        transform: applies amounts to examples.

    Example:
        >>> import bilevel_flax as bf
        >>> policy = bf.outer.image_policy(("rotate", "contrast"), magnitude=0.5)
        >>> round(policy.learned(policy.init())["rotate"]["magnitude"], 3)  # degrees
        45.0
    """

    operations: tuple[Operation, ...]
    limits: tuple[float, ...]
    num_classes: int | None
    magnitude: float
    probability: float
    temperature: float
    hard: bool
    rank: int
    transform: Callable[[jax.Array, Mapping[str, jax.Array], jax.Array], jax.Array]

    def __post_init__(self):
        for name in ("magnitude", "probability"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must lie in (0, 1): where the policy starts"
                    + (", as a fraction of the limits" if name == "magnitude" else "")
                )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0")
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)

    @property
    def names(self) -> tuple[str, ...]:
        """The operations' names."""
        return tuple(operation.name for operation in self.operations)

    def limit(self, name: str) -> float:
        """The largest magnitude of an operation, in its unit."""
        return self.limits[self.names.index(name)]

    def graded(self, name: str) -> bool:
        """Whether an operation has a magnitude that is learned."""
        return self.operations[self.names.index(name)].graded

    def init(self) -> PyTree:
        """x: `{operation: {"magnitude": logit, "probability": logit}}`, each [] or [num_classes].

        An operation without a magnitude has no such leaf.
        """
        return self._logits(
            {
                each.name: {"magnitude": self.magnitude * limit, "probability": self.probability}
                for each, limit in zip(self.operations, self.limits, strict=True)
            }
        )

    def at(self, values: Mapping[str, Mapping[str, Any]]) -> PyTree:
        """The x of given magnitudes and probabilities; operations not named are never applied.

        Args:
            values: as `learned` returns them: magnitudes in the operations' units, numbers or
                [num_classes]. A magnitude that is not given is the limit, a probability 1.

        Raises:
            ValueError: an unknown operation, a value out of its range or of a wrong shape.
        """
        for name in values:
            if name not in self.names:
                raise ValueError(f"{name!r} is not in the policy, only {', '.join(self.names)}")
        never = {"magnitude": 0.0, "probability": 0.0}
        return self._logits({name: values.get(name, never) for name in self.names})

    def _logits(self, values: Mapping[str, Mapping[str, Any]]) -> PyTree:
        shape = () if self.num_classes is None else (self.num_classes,)
        x = {}
        for each, limit in zip(self.operations, self.limits, strict=True):
            given = values[each.name]
            ranges = {"magnitude": limit, "probability": 1.0}
            leaves = {}
            for leaf, most in ranges.items():
                value = np.asarray(given.get(leaf, most), np.float64)
                unit = f" ({each.unit})" if leaf == "magnitude" else ""
                if value.shape not in ((), shape):
                    raise ValueError(
                        f"{each.name}: {leaf} has shape {value.shape}, expected a number"
                        + (f" or {shape}" if shape else "")
                    )
                if not np.all((value >= 0) & (value <= most)):
                    raise ValueError(
                        f"{each.name}: {leaf}={value.tolist()} must lie in [0, {most:g}]{unit}"
                    )
                share = np.clip(value / most, _ALMOST, 1 - _ALMOST)
                logit = np.broadcast_to(np.log(share / (1 - share)), shape)
                leaves[leaf] = jnp.array(logit, jnp.float32)
            if not each.graded:
                del leaves["magnitude"]
            x[each.name] = leaves
        return x

    def learned(self, outer_params: PyTree) -> dict[str, dict[str, Any]]:
        """Magnitudes in their units and probabilities, numbers or lists by class.

        Args:
            outer_params: x.
        """
        values = {}
        for each, limit in zip(self.operations, self.limits, strict=True):
            leaves = outer_params[each.name]
            probability = np.asarray(jax.nn.sigmoid(leaves["probability"]), np.float64)
            if each.graded:
                magnitude = limit * np.asarray(jax.nn.sigmoid(leaves["magnitude"]), np.float64)
            else:
                magnitude = np.ones_like(probability)
            values[each.name] = {
                "magnitude": magnitude.tolist(),
                "probability": probability.tolist(),
            }
        return values

    def strengths(self, outer_params: PyTree) -> dict[str, np.ndarray]:
        """Probability times magnitude as a fraction of its limit, in [0, 1]: [] or [num_classes].

        Args:
            outer_params: x.
        """
        values = self.learned(outer_params)
        return {
            each.name: np.asarray(values[each.name]["probability"])
            * np.asarray(values[each.name]["magnitude"])
            / (limit if each.graded else 1.0)
            for each, limit in zip(self.operations, self.limits, strict=True)
        }

    def amounts(
        self, outer_params: PyTree, drawn: Draws, labels: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """How much of each operation each example gets, float32 [batch], in the units.

        Args:
            outer_params: x.
            drawn: what was drawn for the minibatch.
            labels: int [batch], the classes, for a policy by class.
        """
        batch = drawn.amount.shape[1]

        def of_examples(leaf):
            return jnp.broadcast_to(leaf, (batch,)) if labels is None else rows_at(leaf, labels)

        amounts = {}
        for number, (each, limit) in enumerate(zip(self.operations, self.limits, strict=True)):
            leaves = outer_params[each.name]
            chance, size = drawn.applied[number], drawn.amount[number]
            logit = of_examples(leaves["probability"])
            threshold = jnp.log(chance) - jnp.log1p(-chance)
            gate = jax.nn.sigmoid((logit - threshold) / self.temperature)
            if self.hard:
                gate = gate + jax.lax.stop_gradient((logit > threshold) - gate)
            if each.graded:
                size = 2 * size - 1 if each.signed else size
                gate = gate * limit * jax.nn.sigmoid(of_examples(leaves["magnitude"])) * size
            amounts[each.name] = gate
        return amounts

    def apply(
        self,
        outer_params: PyTree,
        examples: jax.Array,
        key: jax.Array,
        labels: jax.Array | None = None,
    ) -> jax.Array:
        """Augments a minibatch; differentiable in x.

        Args:
            outer_params: x, as of `init`.
            examples: images float [batch, height, width, channels] in [0, 1], or signals float
                [batch, time, channels].
            key: of all draws. A stateful loss is handed one key a step; with it primal and
                tangents see the same draw.
            labels: int [batch], for a policy by class; NaN comes of one outside the classes.

        Returns:
            As `examples`.

        Raises:
            TypeError: examples that are no floats.
            ValueError: examples of a wrong rank, labels that are missing or of a wrong shape.
        """
        self._check(examples, labels)
        drawn = draw(key, len(self.operations), len(examples))
        by_class = None if self.num_classes is None else labels
        amounts = self.amounts(outer_params, drawn, by_class)
        amounts = {name: amount.astype(examples.dtype) for name, amount in amounts.items()}
        return self.transform(examples, amounts, drawn.key)

    def _check(self, examples: jax.Array, labels: jax.Array | None) -> None:
        images = self.rank == 4
        name = "images" if images else "signals"
        shape = "[batch, height, width, channels]" if images else "[batch, time, channels]"
        if not jnp.issubdtype(examples.dtype, jnp.floating):
            scaled = ": divide by 255" if images and examples.dtype == jnp.uint8 else ""
            within = " in [0, 1]" if images else ""
            raise TypeError(f"{name}: expected floats{within}, got {examples.dtype}{scaled}")
        if examples.ndim != self.rank:
            raise ValueError(f"{name}: expected {shape}, got shape {tuple(examples.shape)}")
        if self.num_classes is None:
            return
        if labels is None:
            raise ValueError("labels are missing: the policy has magnitudes for each class")
        if labels.shape != (len(examples),) or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels: expected integers [{len(examples)}], got {labels.dtype} "
                f"{list(labels.shape)}"
            )
