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
from bilevel_flax.recipes import checks
from bilevel_flax.recipes.networks import Network
from bilevel_flax.solvers.inner_only import inner_only

CHUNK = 50  # steps of one dispatch
_PREDICT = 250  # examples of one forward pass: larger ones leave the cache of a CPU
_MIXUP = 0.2  # of Beta(α, α): H. Zhang et al. mixup. ICLR 2018


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
        state = self.begin(solver, {}, start)
        return network_alone(self.advance(chunk, state, self.data(rows, labels), steps, alone))

    def probabilities(self, state: TrainState, inputs: np.ndarray) -> np.ndarray:
        """The network's class probabilities, float32 [m, K].

        Raises:
            ValueError: inputs are not like those of the training set.
        """
        checks.inputs_alike("predict", inputs, self.inputs)
        if not len(inputs):
            return np.zeros((0, self.num_classes), np.float32)
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

    def begin(self, solver: Any, extra: dict[str, Any], start: Start | None = None) -> TrainState:
        """A state at step 0; `extra` is model state beside the network's own."""
        # A network that goes on draws from another stream than it began with.
        begun = 0 if start is None else start.state.step
        key = jax.random.fold_in(jax.random.key(self.seed), begun)
        drawn, draws = jax.random.split(key)
        params, model_state = self.network.init(drawn, jnp.asarray(self.inputs[:1]))
        if start is not None:
            params, model_state = start.blended(params), start.state.model_state
        extra = {"network": model_state, **extra}
        return solver.init(params, jnp.zeros(()), model_state=extra, rng=draws)

    def data(self, rows: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """What a compiled chunk of steps reads: all inputs and labels, and the pool of rows."""
        pool = np.zeros(len(self.inputs), np.int32)
        pool[: len(rows)] = rows
        return self._on_device, jnp.asarray(labels, jnp.int32), pool, len(rows)

    def advance(
        self,
        chunk: Callable[..., Any],
        state: TrainState,
        data: tuple[Any, ...],
        until: int,
        watch: Callable[[TrainState], None] | None = None,
    ) -> TrainState:
        """The state at step `until`; `watch` is handed it after every 50 steps."""
        for done in range(int(state.step), until, CHUNK):
            state, finite = chunk(state, *data, length=min(CHUNK, until - done))
            if not finite:
                raise FloatingPointError(
                    f"a training diverged before step {done + CHUNK}: pass optimizer= with a "
                    "smaller step"
                )
            if watch is not None:
                watch(state)
        return state

    @functools.cached_property
    def _on_device(self) -> jax.Array:
        return jnp.asarray(self.inputs)

    def _plain(self, steps: int, mixed: bool):
        if (steps, mixed) not in self._compiled_plain:
            loss = self._mixed_loss if mixed else self._plain_loss
            self._compiled_plain[steps, mixed] = self.compiled(loss, steps)
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

    def compiled(self, loss: Callable[..., Any], steps: int, known: int = 0) -> tuple[Any, Any]:
        """(solver, chunk of steps) for a loss, with so many clean examples in each minibatch."""
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
