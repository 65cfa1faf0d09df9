"""A network and a confusion matrix, learned together from given labels and a few clean ones.

The likelihood of a given label y at an example s is Σ_t T_ty p_t(s): p is the network's, T is
learned by expectation maximisation, each minibatch an E step. Given labels that are held out say
when to stop, which is before wrong ones are known by heart, and what a clean example is worth.

References: see `noise_model.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_flax.base import Aux, TrainState
from bilevel_flax.recipes.noise_model import mostly_right, normalized
from bilevel_flax.recipes.training import CHUNK, Trainer, network_alone

# What one clean example weighs beside a noisy one: at 30 a network learns a hundred by heart where
# classes overlap, at 3 it does not tell classes that are taken for one another.
_WORTHS = (30.0, 3.0)
_MOST = 0.5  # of the clean examples' mean loss beside the noisy ones'
_LOOKS = 30  # at most, at the held-out labels in a training
_MEMORY = 0.995  # of the confusion matrix's counts, a step
_PRIOR = 20.0  # steps that the first confusion matrix counts for
# Of the steps in which it is learned; later some wrong labels are known by heart.
_LEARN_SHARE = 0.8
_TINY = 1e-9  # of a likelihood


class Found(NamedTuple):
    """What a training through noise ends with.

    Attributes:
        state: the network.
        cost: plain steps that were spent.
        clean_weight: of the clean examples' mean loss beside the noisy ones'.
        piloted: whether two weights were tried.
    """

    state: TrainState
    cost: float
    clean_weight: float
    piloted: bool


class _Course:
    """One training: how far it is, and the network under which held-out labels were likeliest."""

    def __init__(
        self,
        through_noise: ThroughNoise,
        rows: np.ndarray,
        labels: np.ndarray,
        held: np.ndarray,
        matrix: np.ndarray | None,
        clean_weight: float,
    ):
        self._of, self._labels, self._held = through_noise, labels, held
        self.clean_weight = clean_weight
        trainer, steps = through_noise.trainer, through_noise.steps
        start = mostly_right(trainer.num_classes) if matrix is None else np.float32(matrix)
        extra = {
            "counts": jnp.asarray(_PRIOR * trainer.batch_size / trainer.num_classes * start),
            "learning": jnp.int32(_LEARN_SHARE * steps if matrix is None else 0),
            "clean_weight": jnp.float32(clean_weight),
        }
        self._state, self._until = trainer.begin(through_noise.solver, extra), 0
        self._data = trainer.data(np.setdiff1d(rows, held), labels)
        self.best, self.likelihoods, self.looks = None, np.full(len(held), -np.inf), 0

    def advance(self, until: int) -> None:
        of, self._until = self._of, until
        self._state = of.trainer.advance(of.chunk, self._state, self._data, until, self._look)
        if not len(self._held):
            self.best = network_alone(self._state)

    def _look(self, state: TrainState) -> None:
        every, held = CHUNK * max(1, round(self._of.steps / _LOOKS / CHUNK)), self._held
        if not len(held) or (state.step % every and state.step < self._until):
            return
        self.looks += 1
        trainer, network = self._of.trainer, network_alone(state)
        probabilities = trainer.probabilities(network, trainer.inputs[held])
        matrix = np.asarray(normalized(state.model_state["counts"]))
        likelihoods = (probabilities * matrix[:, self._labels[held]].T).sum(1)
        likelihoods = np.log(np.maximum(likelihoods, _TINY))
        if self.best is None or likelihoods.mean() > self.likelihoods.mean():
            self.best, self.likelihoods = network, likelihoods


class ThroughNoise:
    """Trainings of so many steps; a quarter as many clean examples as noisy ones in a minibatch.

    Args:
        trainer: its inputs, network and optimiser.
        steps: of a training.
    """

    def __init__(self, trainer: Trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.known = max(1, trainer.batch_size // 4)
        self.solver, self.chunk = trainer.compiled(self._loss, steps, self.known)

    def fit(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        *,
        matrix: np.ndarray | None = None,
        held: np.ndarray | None = None,
        pilot: int = 0,
    ) -> Found:
        """The network, and what it cost.

        Args:
            rows: int [r], which of the noisy ones.
            labels: int32 [n], the clean ones' last.
            matrix: float [K, K], which is not learned then; None: learned.
            held: int [h], noisy ones that are not trained on.
            pilot: steps, rounded up to 50, in which both worths of a clean example are tried, where
                any labels are held out.
        """
        held = np.zeros(0, int) if held is None else held
        pilot = min(self.steps, -(-pilot // CHUNK) * CHUNK)  # where the compiled steps end
        course = functools.partial(_Course, self, rows, labels, held, matrix)
        courses = [course(weight) for weight in self._weights]
        if len(held) and pilot:
            for one in courses:
                one.advance(pilot)
        else:
            courses = courses[:1]
        chosen = _likelier(courses)
        chosen.advance(self.steps)
        assert chosen.best is not None
        spent = self.steps + (len(courses) - 1) * pilot
        # A forward pass is a third of a step.
        looks = sum(one.looks for one in courses) * len(held) / self.trainer.batch_size / 3
        cost = spent * (1 + self.known / self.trainer.batch_size) + looks
        return Found(chosen.best, cost, chosen.clean_weight, len(courses) > 1)

    @property
    def _weights(self) -> tuple[float, ...]:
        clean = self.trainer.num_clean
        ratio = clean / (len(self.trainer.inputs) - clean)
        return tuple(dict.fromkeys(min(_MOST, worth * ratio) for worth in _WORTHS))

    def _loss(self, params: Any, nothing: Any, batch: Any, model_state: Any, rng: Any) -> Any:
        trainer, known = self.trainer, self.known
        logits, new = trainer.network.apply(
            params, model_state["network"], batch["inputs"], True, rng
        )
        log_p, labels = jax.nn.log_softmax(logits), batch["label"]
        given = labels[:-known]
        joint = log_p[:-known] + jnp.log(normalized(model_state["counts"])[:, given]).T
        noisy = -jax.nn.logsumexp(joint, axis=-1)
        clean = -jnp.take_along_axis(log_p[-known:], labels[-known:, None], axis=1)
        # The E step of this minibatch, and the M step of the counts.
        expected = jax.nn.softmax(joint).T @ jax.nn.one_hot(given, trainer.num_classes)
        counts, left = model_state["counts"], model_state["learning"]
        new_counts = _MEMORY * counts + jax.lax.stop_gradient(expected)
        loss = noisy.mean() + model_state["clean_weight"] * clean.mean() + trainer.penalty(params)
        return loss, Aux(
            {
                "network": new,
                "counts": jnp.where(left > 0, new_counts, counts),
                "learning": left - 1,
                "clean_weight": model_state["clean_weight"],
            }
        )


def _likelier(courses: list[_Course]) -> _Course:
    """The first, unless held-out labels are likelier under the other by a standard error."""
    first, other = courses[0], courses[-1]
    ahead = other.likelihoods - first.likelihoods
    if len(ahead) and ahead.mean() > ahead.std() / np.sqrt(len(ahead)):
        return other
    return first
