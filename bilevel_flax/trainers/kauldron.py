"""Kauldron: a `TrainStep` that takes a solver's step.

Needs `pip install kauldron`. The batch is a training minibatch with one more entry, `outer`, that
holds a validation minibatch of the same form: keys such as "batch.image" mean what they meant.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
from kauldron import kd
from kauldron.train import train_step as kd_step

from bilevel_flax.base import Aux, Batch, BilevelSolver, Problem, PyTree
from bilevel_flax.trainers.optimizer import SolverOptimizer, solver_optimizer, train_step


@flax.struct.dataclass
class Context(kd.train.Context):
    """Kauldron's context of a step, with the solver's `Info` for metrics: key "info.outer_loss"."""

    info: Any = None


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class TrainStep(kd_step.TrainStep):
    """Kauldron's step with hyperparameters that are learned: `Trainer(trainstep=TrainStep(...))`.

    z is moved by the trainer's own `optimizer`; v, x and the moments are its optimiser's state,
    which Kauldron saves and shards (`state.opt_state.outer_params` is x). Metrics find what a step
    reported at "info.outer_loss", "info.norms.inner", "info.adjoint_residual" ...

    Attributes:
        solver: `solver(problem, inner=optimizer) -> BilevelSolver`, e.g.
            `functools.partial(bf.auto, steps=1000)`.
        outer_params: x to start from.
        inner_loss: G, `inner_loss(context, outer_params) -> scalar`, of Kauldron's context after
            the forward pass (`context.preds`, `context.batch`).
        outer_loss: F, of the same form, in evaluation mode; None: the trainer's `train_losses`.
        per_sample: as for `bf.Problem`.
    """

    solver: Callable[..., BilevelSolver]
    outer_params: PyTree
    inner_loss: Callable[..., Any]
    outer_loss: Callable[..., Any] | None = None
    per_sample: PyTree = None

    @functools.cached_property
    def _optimizer(self) -> SolverOptimizer:
        losses = self._loss(self.inner_loss, True), self._loss(self.outer_loss, False)
        problem = Problem(*losses, stateful=True, per_sample=self.per_sample)
        return solver_optimizer(self.solver(problem, inner=self.optimizer), self.outer_params)

    def _loss(self, loss: Callable[..., Any] | None, is_training: bool):
        def call(z, x, batch, kept, rng):
            context = kd.train.Context(
                step=kept["step"], batch=batch, params=z, collections=kept["collections"]
            )
            names = sorted(self.rng_streams.train_rngs(0))
            rngs = {name: jax.random.fold_in(rng, i) for i, name in enumerate(names)}
            context = kd_step.forward(context, model=self.model, rngs=rngs, is_training=is_training)
            if loss is None:
                value, _ = kd.losses.compute_losses(losses=self.aux.losses, context=context)
            else:
                value = loss(context, x)
            return value, Aux({**kept, "collections": context.collections})

        return call

    def _init_optimizer(self, state: Any) -> Any:
        @jax.jit  # outside of one, scalars would not lie on the whole mesh
        def init(state):
            state = state.replace(opt_state=self._optimizer.init(state.params))
            return kd.sharding.with_sharding_constraint(state, self.sharding.state)

        return init(state)

    def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        if "outer" not in batch:
            raise ValueError(
                f'the batch has {sorted(batch)} and no "outer": let the pipeline put a validation '
                "minibatch of the same form there"
            )
        inner = {name: leaf for name, leaf in batch.items() if name != "outer"}
        kept = {"step": state.step, "collections": state.collections}
        pair = Batch(inner, batch["outer"])
        params, opt_state, kept, info = train_step(
            self._optimizer.solver, state.params, state.opt_state, pair, kept
        )
        # Metrics are of the old point, as Kauldron's; where none are asked for this costs nothing.
        context = Context.from_state_and_batch(state=state, batch=batch)
        _, context = kd_step.forward_with_loss(
            context,
            model=self.model,
            losses=self.aux.losses,
            rngs=self.rng_streams.train_rngs(state.step),
            is_training=True,
        )
        updates = jax.tree.map(lambda new, old: new - old, params, state.params)
        context = context.replace(updates=updates, opt_state=state.opt_state, info=info)
        next_state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=kept["collections"],
        )
        return next_state, self.aux.update_context(context)
