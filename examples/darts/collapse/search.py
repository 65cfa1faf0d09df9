"""Searches in the space at one budget, and four ways to take a network from each.

The strongest operation of each edge when the search ends; the strongest ones before the largest
curvature of F in x rises; the operation whose removal hurts most, with training in between and
without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.base import BilevelSolver
from bilevel_flax.data import FiniteSum
from bilevel_flax.solvers import table
from bilevel_flax.train.errors import raise_if_diverged
from bilevel_flax.train.step_runner import StepRunner
from examples.darts import selection
from examples.darts.collapse import space
from examples.darts.collapse.space import EDGES, MIXTURE, OPERATIONS, Genotype

UNITS = {"soba": 4, "auto": 4, "darts1": 2, "darts2": 4}  # gradient units of one step
BUDGET = 4000
SELECTIONS = ("strongest", "early stop", "perturbation", "perturbation alone")
EXAMPLES, BATCH_SIZE = 128, 32  # of each loss
INNER_RATE = 0.01
OUTER_RATE = 0.005  # of Adam on x, for each unit that a step costs: equal travel for all
RECORDS = 20
SETTLE_STEPS, SETTLE_RATE = 50, 0.001


class Found(NamedTuple):
    """A network and what finding it cost.

    Attributes:
        selection: how it was taken from the search.
        genotype: the network.
        units: gradient units, those of the curvature or of the training in between included.
    """

    selection: str
    genotype: Genotype
    units: float


class Records(NamedTuple):
    """What a search leaves behind.

    Attributes:
        inner_params: the last z.
        weights: float32 [records, 6, 2], the mixtures, at equal distances.
        curvature: float32 [records], the largest eigenvalue of ∇²₂₂F.
    """

    inner_params: Any
    weights: np.ndarray
    curvature: np.ndarray


def make_problem(decay: float = space.WEIGHT_DECAY) -> bf.Problem:
    """G, with this decay of z, and F, both with the statistics of the minibatch."""
    weights_of = lambda x: MIXTURE.weights(x)["cell"]
    return bf.Problem(
        lambda z, x, batch: space.training_loss(z, weights_of(x), batch, decay),
        lambda z, x, batch: space.cross_entropy(z, weights_of(x), batch),
    )


def halves(seed: int, examples: int = EXAMPLES) -> tuple[FiniteSum, FiniteSum]:
    """The digits of G and of F, drawn by the seed."""
    digits = space.training_digits()
    parts = data.stratified(digits.label, {"inner": examples, "outer": examples}, seed=seed)
    inner, outer = (
        data.partition(
            {"image": digits.image[rows], "label": digits.label[rows]}, BATCH_SIZE, seed=seed
        )
        for rows in parts.values()
    )
    return inner, outer


def make_solver(problem: bf.Problem, method: str, steps: int) -> BilevelSolver:
    """Adam on z with a cosine to 0, and on x; `auto` with its own way to move x."""
    inner = optax.adam(optax.cosine_decay_schedule(INNER_RATE, steps))
    if method == "auto":
        return bf.auto(problem, inner=inner, steps=steps)
    outer = optax.adam(OUTER_RATE * UNITS[method], b1=0.5)
    return table.method(method)(problem, inner=inner, outer=outer)


class Searcher:
    """Runs a method's searches, compiled once.

    Args:
        method: one of UNITS.
        budget: gradient units of a search.
        decay: of z in the search; the networks of the table have `space.WEIGHT_DECAY`.

    Attributes:
        steps: of a search.
    """

    def __init__(self, method: str, budget: int = BUDGET, decay: float = space.WEIGHT_DECAY):
        self.method, self.steps = method, budget // UNITS[method]
        self._solver = make_solver(make_problem(decay), method, self.steps)
        self._compiled: StepRunner | None = None

    def __call__(self, sides: tuple[FiniteSum, FiniteSum], seed: int) -> Records:
        """One search.

        Args:
            sides: digits of G and of F.
            seed: of z, x and the order of the minibatches.

        Raises:
            Diverged: a direction was not finite.
        """
        loop = StepRunner(self._solver, *sides, seed=seed, compiled_as=self._compiled)
        of_z, of_x, of_run = jax.random.split(jax.random.key(seed), 3)
        state = self._solver.init(space.init(of_z), MIXTURE.init(of_x), rng=of_run)
        everything = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sides[1].batches)
        weights, curvatures, step = [], [], 0
        for stop in np.linspace(0, self.steps, RECORDS + 1).astype(int)[1:]:
            while step < stop:
                state, info = loop.run(state, step, int(stop))
                step += len(info.inner_loss)
                raise_if_diverged(info, step, None)
            logits = state.outer_params["cell"]
            weights.append(np.asarray(jax.nn.softmax(logits, -1)))
            curvatures.append(float(curvature(state.inner_params, logits, everything)))
        self._compiled = loop
        return Records(state.inner_params, np.stack(weights), np.array(curvatures))


@jax.jit
def curvature(z: Any, logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The largest eigenvalue of ∇²₂₂F: six Hessian-vector products, for a row's sum is idle."""
    along = jnp.array([1.0, -1.0]) / jnp.sqrt(2.0)
    loss = lambda d: space.cross_entropy(
        z, jax.nn.softmax(logits + d[:, None] * along[None]), batch
    )
    return jnp.linalg.eigvalsh(jax.hessian(loss)(jnp.zeros(len(EDGES))))[-1]


def select(
    method: str,
    records: Records,
    sides: tuple[FiniteSum, FiniteSum],
    decay: float = space.WEIGHT_DECAY,
) -> Iterator[Found]:
    """Takes a network in each of the four ways, from a search with this decay."""
    steps = BUDGET // UNITS[method]
    yield Found("strongest", _strongest(records.weights[-1]), steps * UNITS[method])
    batches = sides[1].num_batches
    at = selection.stop_before_rise(records.curvature, window=5)
    spent = steps * UNITS[method] * (at + 1) / len(records.weights)
    judged = (at + 1) * batches * len(EDGES)
    yield Found("early stop", _strongest(records.weights[at]), spent + judged)
    for name in SELECTIONS[2:]:
        supernet = _Supernet(records.inner_params, *sides, decay)
        chosen = selection.select_by_perturbation(
            supernet.score,
            records.weights[-1],
            OPERATIONS,
            settle=supernet.train if name == "perturbation" else lambda weights: None,
        )
        yield Found(name, tuple(chosen), steps * UNITS[method] + supernet.units)


def _strongest(weights: np.ndarray) -> Genotype:
    return tuple(selection.strongest(weights, OPERATIONS))


class _Supernet:
    """z, judged on the digits of F and trained on on those of G."""

    def __init__(self, z: Any, inner: FiniteSum, outer: FiniteSum, decay: float):
        self.z, self._inner, self._outer, self._decay = z, inner, outer, decay
        self.units = 0.0

    def score(self, weights: np.ndarray) -> float:
        self.units += self._outer.num_batches / 3  # a forward pass, a third of a gradient
        return -float(_mean_loss(self.z, weights, self._outer.batches))

    def train(self, weights: np.ndarray) -> None:
        self.z = _trained_on(self.z, weights, self._inner.batches, self._decay)
        self.units += SETTLE_STEPS


@jax.jit
def _mean_loss(z: Any, weights: jax.Array, batches: Any) -> jax.Array:
    return jax.lax.map(lambda batch: space.cross_entropy(z, weights, batch), batches).mean()


@jax.jit
def _trained_on(z: Any, weights: jax.Array, batches: Any, decay: float) -> Any:
    optimizer = optax.adam(SETTLE_RATE)
    count = len(batches["label"])

    def step(carry, number):
        z, opt_state = carry
        batch = jax.tree.map(lambda leaf: leaf[number % count], batches)
        updates, opt_state = optimizer.update(
            jax.grad(space.training_loss)(z, weights, batch, decay), opt_state, z
        )
        return (optax.apply_updates(z, updates), opt_state), None

    (z, _), _ = jax.lax.scan(step, (z, optimizer.init(z)), jnp.arange(SETTLE_STEPS))
    return z
