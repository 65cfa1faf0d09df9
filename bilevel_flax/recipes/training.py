"""Plain trainings of one network on parts of one data set, compiled once for all of them.

Every training draws its minibatches, with replacement, from a pool of rows: which rows, and with
which labels, are arguments of the compiled step, so that rounds of filtering and relabelling do not
compile anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import Aux, Batch, Problem, PyTree, TrainState
from bilevel_flax.recipes.networks import Network
from bilevel_flax.recipes.noise_model import mostly_right, normalized
from bilevel_flax.solvers.inner_only import inner_only

_CHUNK = 50  # steps of one dispatch
_LOOKS = 30  # at most, at the held-out labels in a training
_PREDICT = 2000  # examples of one forward pass
_MEMORY = 0.995  # of the confusion matrix's counts, a step
_TINY = 1e-9  # of a likelihood
_MIXUP = 0.2  # of Beta(α, α): H. Zhang et al. mixup. ICLR 2018
_PRIOR = 20.0  # steps that the first confusion matrix counts for
# Of the steps in which it is learned; later some wrong labels are known by heart.
_LEARN_SHARE = 0.8
# Of the mean loss of clean examples beside that of noisy ones: at 1 a network learns 40 of them by
# heart where classes overlap, at .25 it does not tell classes that are taken for one another.
_CLEAN_WEIGHT = 0.5


class Start(NamedTuple):
    """Where a network begins: at `1 - fresh` of a trained one and `fresh` of a new one.

    A part of a new one, since from a trained one alone the next training generalises less well than
    from nothing (J. Ash, R. Adams. On warm-starting neural network training. NeurIPS 2020).
    """

    state: TrainState
    fresh: float = 0.0

    def blended(self, new: PyTree) -> PyTree:
        """The parameters to begin with, given newly drawn ones."""

        def between(old, new):
            if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
                return old
            return ((1 - self.fresh) * old + self.fresh * new).astype(old.dtype)

        return jax.tree.map(between, self.state.inner_params, new)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Trainings on rows of `inputs`.

    Attributes:
        network: what is trained.
        inputs: [n, ...], the examples of all trainings; the last `num_clean` are the clean ones.
        num_clean: m.
        num_classes: K.
        batch_size: examples a step.
        optimizer: `optimizer(steps)`, z's in a training of so many steps.
        penalty: `penalty(params) -> scalar`, added to the mean loss.
        seed: of networks and minibatches.
    """

    network: Network
    inputs: np.ndarray
    num_clean: int
    num_classes: int
    batch_size: int
    optimizer: Callable[[int], optax.GradientTransformation]
    penalty: Callable[[PyTree], Any]
    seed: int

    def fit(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        steps: int,
        watch: Callable[[TrainState], None] | None = None,
        *,
        start: Start | None = None,
        mixed: bool = False,
    ) -> TrainState:
        """A network trained on some rows.

        Args:
            rows: int [r], which.
            labels: int32 [n], of all rows.
            steps: of the training.
            watch: is handed the state after every 50 steps.
            start: where the network begins; None: at random.
            mixed: mixup: each example, where examples are floating point numbers, is drawn a little
                towards another of its minibatch, and so is its label.
        """
        mixed = mixed and np.issubdtype(self.inputs.dtype, np.floating)
        solver, chunk = self._plain(steps, mixed)
        alone = None if watch is None else lambda state: watch(network_alone(state))
        return network_alone(self._run(solver, chunk, rows, labels, steps, {}, alone, start))

    def fit_through_noise(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        steps: int,
        *,
        matrix: np.ndarray | None = None,
        held: np.ndarray | None = None,
    ) -> tuple[TrainState, float]:
        """A network trained on given labels through a confusion matrix that is learned with it.

        A quarter as many clean examples as noisy ones are a part of every minibatch.

        Args:
            rows: int [r], which of the noisy ones.
            labels: int32 [n], the clean ones' last.
            steps: of the training.
            matrix: float [K, K], which is not learned then; None: learned.
            held: int [h], noisy ones that are not trained on: the network is the one under which
                their given labels are likeliest, which is before it learns wrong ones by heart.

        Returns:
            (the network, the cost in plain steps).
        """
        solver, chunk = self._through_noise(steps)
        start = mostly_right(self.num_classes) if matrix is None else np.float32(matrix)
        counts = _PRIOR * self.batch_size / self.num_classes * start
        learned_in = _LEARN_SHARE * steps if matrix is None else 0
        extra = {"counts": jnp.asarray(counts), "learning": jnp.int32(learned_in)}
        cost = steps * (1 + self._num_known / self.batch_size)
        if held is None:
            state = self._run(solver, chunk, rows, labels, steps, extra)
            return network_alone(state), cost

        every = _CHUNK * max(1, round(steps / _LOOKS / _CHUNK))
        given, looks, highest, best = labels[held], 0, -np.inf, None

        def watch(state: TrainState) -> None:
            nonlocal looks, highest, best
            if state.step % every and state.step < steps:
                return
            looks += 1
            probabilities = self.probabilities(network_alone(state), self.inputs[held])
            matrix = np.asarray(normalized(state.model_state["counts"]))
            likelihood = (probabilities * matrix[:, given].T).sum(1)
            score = float(np.log(np.maximum(likelihood, _TINY)).mean())
            if best is None or score > highest:
                highest, best = score, network_alone(state)

        last = self._run(solver, chunk, np.setdiff1d(rows, held), labels, steps, extra, watch)
        cost += looks * len(held) / self.batch_size / 3  # a forward pass is a third of a step
        return best or network_alone(last), cost

    def probabilities(self, state: TrainState, inputs: np.ndarray) -> np.ndarray:
        """The network's class probabilities, float32 [m, K]."""
        size = min(_PREDICT, len(inputs))
        padded = np.concatenate([inputs, inputs[: -len(inputs) % size]])
        network = (state.inner_params, state.model_state)
        parts = [
            self._predict(*network, padded[at : at + size]) for at in range(0, len(padded), size)
        ]
        return np.concatenate(parts)[: len(inputs)]

    @functools.cached_property
    def _predict(self) -> Callable[..., jax.Array]:
        def predict(params, model_state, inputs):
            logits, _ = self.network.apply(params, model_state, inputs, False, jax.random.key(0))
            return jax.nn.softmax(logits.astype(jnp.float32))

        return jax.jit(predict)

    def _run(self, solver, chunk, rows, labels, steps, extra, watch=None, start=None) -> TrainState:
        # A network that goes on draws from another stream than it began with.
        key = jax.random.fold_in(jax.random.key(self.seed), start is not None)
        drawn, draws = jax.random.split(key)
        params, model_state = self.network.init(drawn, jnp.asarray(self.inputs[:1]))
        if start is not None:
            params, model_state = start.blended(params), start.state.model_state
        extra = {"network": model_state, **extra}
        state = solver.init(params, jnp.zeros(()), model_state=extra, rng=draws)
        pool = np.zeros(len(self.inputs), np.int32)
        pool[: len(rows)] = rows
        data = (self._on_device, jnp.asarray(labels, jnp.int32), pool, len(rows))
        for done in range(0, steps, _CHUNK):
            state, finite = chunk(state, *data, length=min(_CHUNK, steps - done))
            if not finite:
                raise FloatingPointError(
                    f"a training diverged before step {done + _CHUNK}: pass optimizer= with a "
                    "smaller step"
                )
            if watch is not None:
                watch(state)
        return state

    @functools.cached_property
    def _on_device(self) -> jax.Array:
        return jnp.asarray(self.inputs)

    @property
    def _num_known(self) -> int:
        return max(1, self.batch_size // 4)

    def _plain(self, steps: int, mixed: bool):
        if (steps, mixed) not in self._compiled_plain:
            loss = self._mixed_loss if mixed else self._plain_loss
            self._compiled_plain[steps, mixed] = self._compiled(loss, steps, known=0)
        return self._compiled_plain[steps, mixed]

    @functools.cached_property
    def _compiled_plain(self) -> dict[tuple[int, bool], Any]:
        return {}

    def _mixed_loss(self, params, nothing, batch, model_state, rng):
        drawn, order, rng = jax.random.split(rng, 3)
        share = jax.random.beta(drawn, _MIXUP, _MIXUP)
        share = jnp.maximum(share, 1 - share)  # an example's own part is the larger one
        order = jax.random.permutation(order, len(batch["label"]))
        inputs = share * batch["inputs"] + (1 - share) * batch["inputs"][order]
        inputs = inputs.astype(batch["inputs"].dtype)
        logits, new = self.network.apply(params, model_state["network"], inputs, True, rng)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        own, other = (cross_entropy(logits, batch["label"][rows]) for rows in (slice(None), order))
        loss = jnp.mean(share * own + (1 - share) * other)
        return loss + self.penalty(params), Aux({"network": new})

    def _plain_loss(self, params, nothing, batch, model_state, rng):
        logits, new = self.network.apply(params, model_state["network"], batch["inputs"], True, rng)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean() + self.penalty(params), Aux({"network": new})

    def _through_noise(self, steps: int):
        known = self._num_known

        def loss(params, nothing, batch, model_state, rng):
            logits, new = self.network.apply(
                params, model_state["network"], batch["inputs"], True, rng
            )
            log_p, labels = jax.nn.log_softmax(logits), batch["label"]
            given = labels[:-known]
            joint = log_p[:-known] + jnp.log(normalized(model_state["counts"])[:, given]).T
            noisy = -jax.nn.logsumexp(joint, axis=-1)
            clean = -jnp.take_along_axis(log_p[-known:], labels[-known:, None], axis=1)
            # The E step of this minibatch, and the M step of the counts.
            expected = jax.nn.softmax(joint).T @ jax.nn.one_hot(given, self.num_classes)
            counts, left = model_state["counts"], model_state["learning"]
            new_counts = _MEMORY * counts + jax.lax.stop_gradient(expected)
            model_state = {
                "network": new,
                "counts": jnp.where(left > 0, new_counts, counts),
                "learning": left - 1,
            }
            return noisy.mean() + _CLEAN_WEIGHT * clean.mean() + self.penalty(params), Aux(
                model_state
            )

        return self._compiled(loss, steps, known)

    def _compiled(self, loss: Callable, steps: int, known: int):
        solver = inner_only(Problem(loss, loss, stateful=True), inner=self.optimizer(steps))
        count = len(self.inputs)

        @functools.partial(jax.jit, static_argnames="length")
        def chunk(state, inputs, labels, pool, size, *, length):
            def one(state, _):
                key = jax.random.fold_in(state.rng, 2 * state.step + 1)
                drawn, drawn_known = jax.random.split(key)
                rows = pool[jax.random.randint(drawn, (self.batch_size,), 0, size)]
                if known:
                    first = count - self.num_clean
                    rows = jnp.append(rows, jax.random.randint(drawn_known, (known,), first, count))
                batch = {"inputs": inputs[rows], "label": labels[rows]}
                state, info = solver.update(state, Batch(batch, ()))
                return state, info.finite.inner

            state, finite = jax.lax.scan(one, state, length=length)
            return state, finite.all()

        return solver, chunk


def network_alone(state: TrainState) -> TrainState:
    """The state with the network's own variables for model state."""
    return state.replace(model_state=state.model_state["network"])
