"""What people do about wrong labels, each in its best form, at the same number of steps a training.

    no_weights        all given labels, stopped where the error on the clean examples is lowest
    as_given          all given labels and the clean ones, to the end
    clean_only        the clean examples alone
    pseudo_labels     what clean_only is surer of than .9, and the clean examples
    rounds_noisy      filter, train, relabel (> .9), train: from the early-stopped noisy network,
    rounds_clean        from the clean-only one,
    rounds_both         from the product of both
    cross_validation  five folds, confident learning (cleanlab where it is installed), train
    small_loss        two Gaussians on the losses of no_weights, the better one kept, relabel, train
    gold_correction   a confusion matrix read off the clean examples, forward correction
    meta_weight_net   a network on the loss gives the weights, learned by bf.auto
    weights           a weight for each example, learned by bf.auto; its network is handed over
    clean             bf.recipes.clean
    true_labels       what perfect cleaning would give

Filter: keep the labels that the network agrees with. Every training but no_weights and the bilevel
ones has the clean examples among its own.

References:
    C. Northcutt, L. Jiang, I. Chuang. Confident learning. JAIR 2021. D. Hendrycks et al. NeurIPS
    2018 (gold loss correction). J. Li, R. Socher, S. Hoi. DivideMix. ICLR 2020 (the mixture on the
    losses). J. Shu et al. Meta-Weight-Net. NeurIPS 2019.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax.recipes.networks import as_network
from bilevel_flax.recipes.through_noise import ThroughNoise
from bilevel_flax.recipes.training import Trainer
from examples.mnist_hypercleaning import handover
from examples.mnist_hypercleaning.model import make_model

_FOLDS = 5
_SURE = 0.9
_STEP, _DECAY = 1e-3, 1e-4


def _adamw(steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.linear_schedule(_STEP, 0.0, steps), weight_decay=_DECAY)


class Outcome(NamedTuple):
    """What a method ends with.

    Attributes:
        probabilities: float [n, K] of the training examples' true labels.
        doubt: float [n], high: the given label is wrong.
        predict: the network that it hands over.
        cost: in plain trainings.
    """

    probabilities: np.ndarray
    doubt: np.ndarray
    predict: Callable[[np.ndarray], np.ndarray]
    cost: float


class Bout:
    """One setting: the data, a network, and the trainings that several methods start from.

    Args:
        examples: `task.Examples`.
        model: the network's name.
        steps: of a training.
        batch_size: examples a step.
        seed: of networks and minibatches.
    """

    def __init__(self, examples: Any, model: str, steps: int, batch_size: int, seed: int):
        self.examples, self.steps, self.batch_size, self.seed = examples, steps, batch_size, seed
        self.network = make_model(model, examples.num_classes)
        clean_count, count = len(examples.validation_labels), len(examples.given_labels)
        self.trainer = Trainer(
            as_network(self.network),
            np.concatenate([examples.train_images, examples.validation_images]),
            clean_count,
            examples.num_classes,
            batch_size,
            _adamw,
            handover.penalty,
            seed,
        )
        self.given = examples.given_labels
        self.labels = np.concatenate([self.given, examples.validation_labels])
        self.noisy_rows = np.arange(count)
        self.clean_rows = np.arange(count, count + clean_count)
        self._starts: dict[str, tuple[Any, np.ndarray]] = {}

    def train(self, kept: np.ndarray, labels: np.ndarray | None = None):
        """A network on the kept noisy rows and the clean ones; (state, probabilities)."""
        all_labels = self.labels
        if labels is not None:
            all_labels = np.concatenate([labels, self.examples.validation_labels])
        rows = np.append(self.noisy_rows[kept], self.clean_rows)
        state = self.trainer.fit(rows, all_labels.astype(np.int32), self.steps)
        return state, self.judge(state)

    def judge(self, state: Any) -> np.ndarray:
        """Probabilities of the training examples."""
        return self.trainer.probabilities(state, self.examples.train_images)

    def outcome(self, state: Any, probabilities: np.ndarray, cost: float) -> Outcome:
        """Judged by the network itself: its probability of the given label."""
        doubt = 1 - probabilities[self.noisy_rows, self.given]
        return Outcome(probabilities, doubt, lambda x: self.trainer.probabilities(state, x), cost)

    def start(self, name: str) -> tuple[Any, np.ndarray]:
        """(state, probabilities) of "noisy" or "clean", trained once for all methods."""
        if name not in self._starts:
            if name == "clean":
                state = self.trainer.fit(self.clean_rows, self.labels, self.steps)
            else:
                state = self._stopped_early()
            self._starts[name] = (state, self.judge(state))
        return self._starts[name]

    def _stopped_early(self) -> Any:
        ex, best = self.examples, [np.inf, None]

        def watch(state) -> None:
            judged = self.trainer.probabilities(state, ex.validation_images).argmax(1)
            error = np.mean(judged != ex.validation_labels)
            if error < best[0]:
                best[:] = [error, state]

        self.trainer.fit(self.noisy_rows, self.labels, self.steps, watch)
        return best[1]


def _no_weights(bout: Bout) -> Outcome:
    return bout.outcome(*bout.start("noisy"), 1.0)


def _as_given(bout: Bout) -> Outcome:
    return bout.outcome(*bout.train(np.ones(len(bout.given), bool)), 1.0)


def _clean_only(bout: Bout) -> Outcome:
    return bout.outcome(*bout.start("clean"), 1.0)


def _true_labels(bout: Bout) -> Outcome:
    everything = np.ones(len(bout.given), bool)
    return bout.outcome(*bout.train(everything, bout.examples.true_labels), 1.0)


def _pseudo_labels(bout: Bout) -> Outcome:
    _, first = bout.start("clean")
    return bout.outcome(*bout.train(first.max(1) > _SURE, first.argmax(1)), 2.0)


def _rounds(bout: Bout, first: np.ndarray, cost: float) -> Outcome:
    _, second = bout.train(first.argmax(1) == bout.given)
    state, third = bout.train(second.max(1) > _SURE, second.argmax(1))
    return bout.outcome(state, third, cost + 2.0)


def _rounds_noisy(bout: Bout) -> Outcome:
    return _rounds(bout, bout.start("noisy")[1], 1.0)


def _rounds_clean(bout: Bout) -> Outcome:
    return _rounds(bout, bout.start("clean")[1], 1.0)


def _rounds_both(bout: Bout) -> Outcome:
    return _rounds(bout, bout.start("noisy")[1] * bout.start("clean")[1], 2.0)


def _small_loss(bout: Bout) -> Outcome:
    from sklearn.mixture import GaussianMixture

    _, first = bout.start("noisy")
    losses = -np.log(first[bout.noisy_rows, bout.given] + 1e-6)[:, None]
    parts = GaussianMixture(2, random_state=bout.seed).fit_predict(losses)
    means = [losses[parts == k].mean() if (parts == k).any() else np.inf for k in (0, 1)]
    _, second = bout.train(parts == np.argmin(means))
    state, third = bout.train(second.max(1) > _SURE, second.argmax(1))
    return bout.outcome(state, third, 3.0)


def _cross_validation(bout: Bout) -> Outcome:
    fold = np.random.default_rng(bout.seed).integers(0, _FOLDS, len(bout.given))
    probabilities = np.zeros((len(bout.given), bout.examples.num_classes), np.float32)
    for number in range(_FOLDS):
        _, judged = bout.train(fold != number)
        probabilities[fold == number] = judged[fold == number]
    state, _ = bout.train(~_confidently_wrong(bout.given, probabilities))
    return bout.outcome(state, probabilities, _FOLDS + 1.0)


def _confidently_wrong(given: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    try:
        from cleanlab.filter import find_label_issues  # pyright: ignore[reportMissingImports]
    except ImportError:
        # Confident learning's own rule: above the mean confidence of another class.
        classes = range(probabilities.shape[1])
        means = np.array([probabilities[given == k, k].mean() for k in classes])
        above = np.where(probabilities >= means, probabilities, 0.0)
        return (above.max(1) > 0) & (above.argmax(1) != given)
    return find_label_issues(given, probabilities)


def _gold_correction(bout: Bout) -> Outcome:
    ex = bout.examples
    state, _ = bout.start("noisy")
    on_clean = bout.trainer.probabilities(state, ex.validation_images)
    matrix = np.stack([on_clean[ex.validation_labels == k].mean(0) for k in range(ex.num_classes)])
    found = ThroughNoise(bout.trainer, bout.steps).fit(bout.noisy_rows, bout.labels, matrix=matrix)
    return bout.outcome(found.state, bout.judge(found.state), 1.0 + found.cost / bout.steps)


def _clean(bout: Bout) -> Outcome:
    ex = bout.examples
    cleaned = bf.recipes.clean(
        bout.network,
        (ex.train_images, ex.given_labels),
        (ex.validation_images, ex.validation_labels),
        steps=bout.steps,
        batch_size=bout.batch_size,
        penalty=handover.penalty,
        seed=bout.seed,
    )
    labels = np.eye(ex.num_classes)[cleaned.suggested_label]
    return Outcome(
        labels, cleaned.wrong_probability, cleaned.predict, cleaned.plain_step_equivalents
    )


def _weights(bout: Bout) -> Outcome:
    return _learned(bout, bf.outer.sigmoid(len(bout.given)))


def _meta_weight_net(bout: Bout) -> Outcome:
    return _learned(bout, bf.outer.meta_weight_net())


def _learned(bout: Bout, parametrisation: bf.outer.SampleWeights) -> Outcome:
    """A bilevel run; the network is its own, the judge too (better than the weights)."""
    from examples.mnist_hypercleaning.task import make_problem

    ex = bout.examples
    problem = make_problem(bout.network, parametrisation, 1e-4)
    solver = bf.auto(problem, inner=bout.trainer.optimizer(bout.steps), steps=bout.steps)
    params, model_state = bout.trainer.network.init(
        jax.random.key(bout.seed), jnp.asarray(ex.train_images[:1])
    )
    stateful = {"model_state": model_state} if problem.stateful else {}
    state = solver.init(params, parametrisation.init(), rng=jax.random.key(bout.seed), **stateful)
    sides = (
        {"image": jnp.asarray(ex.train_images), "label": jnp.asarray(ex.given_labels)},
        {"image": jnp.asarray(ex.validation_images), "label": jnp.asarray(ex.validation_labels)},
    )

    @jax.jit
    def hundred(state, sides, key):
        def one(state, key):
            batch = []
            for side, draw in zip(sides, jax.random.split(key), strict=True):
                count = len(side["label"])
                rows = jax.random.randint(draw, (bout.batch_size,), 0, count)
                batch.append({name: leaf[rows] for name, leaf in side.items()} | {"index": rows})
            return solver.update(state, bf.Batch(*batch))[0], None

        return jax.lax.scan(one, state, jax.random.split(key, 100))[0]

    key = jax.random.key(bout.seed + 1)
    for number in range(-(-bout.steps // 100)):
        state = hundred(state, sides, jax.random.fold_in(key, number))
    state = state.replace(model_state=state.model_state or {})
    return bout.outcome(state, bout.judge(state), 4.0)


METHODS: dict[str, Callable[[Bout], Outcome]] = {
    "no_weights": _no_weights,
    "as_given": _as_given,
    "clean_only": _clean_only,
    "pseudo_labels": _pseudo_labels,
    "rounds_noisy": _rounds_noisy,
    "rounds_clean": _rounds_clean,
    "rounds_both": _rounds_both,
    "small_loss": _small_loss,
    "cross_validation": _cross_validation,
    "gold_correction": _gold_correction,
    "meta_weight_net": _meta_weight_net,
    "weights": _weights,
    "clean": _clean,
    "true_labels": _true_labels,
}


def timed(name: str, bout: Bout) -> tuple[Outcome, float]:
    """A method's outcome and its seconds; a start that others share is counted once."""
    began = time.perf_counter()
    outcome = METHODS[name](bout)
    return outcome, time.perf_counter() - began
