"""Plain trainings of one network on parts of one data set, compiled once for all of them.

Every training draws its minibatches, with replacement, from a pool of rows: which rows, and with
which labels, are arguments of the compiled step, so that rounds of filtering and relabelling do not
compile anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_flax.base import Aux, Batch, Problem, PyTree, TrainState
from bilevel_flax.recipes.networks import Network
from bilevel_flax.recipes.noise_model import mostly_right, normalized
from bilevel_flax.solvers.inner_only import inner_only

_CHUNK = 100  # steps of one dispatch
_PREDICT = 2000  # examples of one forward pass
_MEMORY = 0.995  # of the confusion matrix's counts, a step
_PRIOR = 20.0  # steps that the first confusion matrix counts for
_LEARN_SHARE = (
    0.25  # of the steps in which it is learned; later some wrong labels are known by heart
)


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
    ) -> TrainState:
        """A network trained on some rows.

        Args:
            rows: int [r], which.
            labels: int32 [n], of all rows.
            steps: of the training.
            watch: is handed the state after every 100 steps.
        """
        solver, chunk = self._plain(steps)
        return self._run(solver, chunk, rows, labels, steps, {}, watch)

    @property
    def cost_through_noise(self) -> float:
        """What a step of `fit_through_noise` costs, in plain steps."""
        return 1 + self._num_known / self.batch_size

    def fit_through_noise(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        steps: int,
        matrix: np.ndarray | None = None,
    ) -> TrainState:
        """A network trained on given labels through a confusion matrix that is learned with it.

        A quarter as many clean examples as noisy ones are a part of every minibatch.

        Args:
            rows: int [r], which of the noisy ones.
            labels: int32 [n], the clean ones' last.
            steps: of the training.
            matrix: float [K, K], which is not learned then; None: learned.
        """
        solver, chunk = self._through_noise(steps)
        start = mostly_right(self.num_classes) if matrix is None else np.float32(matrix)
        counts = _PRIOR * self.batch_size / self.num_classes * start
        learned_in = _LEARN_SHARE * steps if matrix is None else 0
        extra = {"counts": jnp.asarray(counts), "learning": jnp.int32(learned_in)}
        return self._run(solver, chunk, rows, labels, steps, extra)

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

    def _run(self, solver, chunk, rows, labels, steps, extra, watch=None) -> TrainState:
        start, draws = jax.random.split(jax.random.key(self.seed))
        params, model_state = self.network.init(start, jnp.asarray(self.inputs[:1]))
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
                watch(network_alone(state))
        return network_alone(state)

    @functools.cached_property
    def _on_device(self) -> jax.Array:
        return jnp.asarray(self.inputs)

    @property
    def _num_known(self) -> int:
        return max(1, self.batch_size // 4)

    def _plain(self, steps: int):
        if steps not in self._compiled_plain:
            self._compiled_plain[steps] = self._compiled(self._plain_loss, steps, known=0)
        return self._compiled_plain[steps]

    @functools.cached_property
    def _compiled_plain(self) -> dict[int, Any]:
        return {}

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
            return noisy.mean() + clean.mean() + self.penalty(params), Aux(model_state)

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
