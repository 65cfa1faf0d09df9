"""Levanter: a `Trainer` whose step is a solver's, with an Equinox tree as z.

Needs `pip install levanter`. z is what Levanter calls trainable; all other arrays of the model
(those under a LoRA) are the losses' model state and come from Levanter's state in every step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haliax as hax
import jax
from levanter import trainer
from levanter.trainer_state import trainables_only
from levanter.utils.tree_utils import inference_mode

from bilevel_flax.base import Aux, Batch, BilevelSolver, Problem, PyTree
from bilevel_flax.trainers.levanter_jit import StateJit
from bilevel_flax.trainers.optimizer import solver_optimizer, train_step


def _parts(model: Any, is_trainable: Any) -> tuple[Any, Any, Any]:
    """(what is trained, the other arrays, everything else) of a model."""
    trained = trainables_only(model, is_trainable)
    kept = jax.tree.map(
        lambda leaf, own: None if own is not None else leaf,
        model,
        trained,
        is_leaf=lambda node: node is None,
    )
    return trained, *eqx.partition(kept, eqx.is_array)


def problem(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    model: Any,
    *,
    is_trainable: Any = True,
    mp: Any = None,
    **settings: Any,
) -> Problem:
    """A bilevel problem whose losses take Equinox models.

    Args:
        inner_loss: G, `loss(model, outer_params, batch, key) -> scalar`, an array or a
            `NamedArray`; the model is in training mode.
        outer_loss: F, of the same form; the model is in inference mode.
        model: the model; only what is no array in it is kept.
        is_trainable: Levanter's filter, as for `Trainer.initial_state`.
        mp: Levanter's precision policy (`config.mp`): the losses see the model in its compute
            dtype; None: as it is.
        **settings: `per_sample` and `derivatives`, as for `bf.Problem`.
    """
    *_, static = _parts(model, is_trainable)

    def wrapped(loss, inference):
        def call(z, x, batch, rest, key):
            whole = inference_mode(eqx.combine(z, rest, static), inference)
            whole = whole if mp is None else mp.cast_to_compute(whole)
            value = loss(whole, x, batch, key)
            return value.scalar() if isinstance(value, hax.NamedArray) else value, Aux(rest)

        return call

    losses = wrapped(inner_loss, False), wrapped(outer_loss, True)
    return Problem(*losses, stateful=True, **settings)


class Trainer(trainer.Trainer):
    """Levanter's trainer on pairs of minibatches (`trainers.pairs`).

    v, x and the moments are its optimiser's state: Levanter saves and shards them as its own.

    Args:
        config: Levanter's. Gradients are not watched: a solver has directions, whose norm is
            logged as `train/direction_norm`.
        solver: of `problem`.
        outer_params: x.
        rng: key of the run; None: a fixed one.
        **settings: as Levanter's trainer.

    Raises:
        ValueError: minibatches are to be cut by `per_device_parallelism`.
    """

    def __init__(
        self,
        config: Any,
        solver: BilevelSolver,
        outer_params: PyTree,
        *,
        rng: jax.Array | None = None,
        **settings: Any,
    ):
        size = config.train_batch_size
        if isinstance(size, int) and (config.microbatch_size or size) < size:
            raise ValueError(
                f"per_device_parallelism={config.per_device_parallelism} would add up gradients "
                "that a solver does not take: leave it out, and give the solver "
                "bf.oracles.microbatched(problem, k)"
            )
        targets = config.watch.watch_targets
        targets = [targets] if isinstance(targets, str) else targets
        watch = dataclasses.replace(
            config.watch, watch_targets=[target for target in targets if target != "grads"]
        )
        config = dataclasses.replace(config, watch=watch)
        optimizer = solver_optimizer(solver, outer_params, rng=rng)
        super().__init__(config, optimizer, lambda *_, **__: None, **settings)

    @functools.cached_property
    def _jit_train_step_fn(self):
        return StateJit(self._train_step, self.parameter_axis_mapping)

    @functools.cached_property
    def _jit_train_step_fn_no_hook(self):
        step = functools.partial(self._train_step, _no_hooks=True)
        return StateJit(step, self.parameter_axis_mapping)

    def _train_step(self, state: Any, batch: Any, batch_kwargs: Any, _no_hooks: bool = False):
        del batch_kwargs
        (pair,) = batch
        z, rest, _ = _parts(state.model, state.is_trainable)
        minibatches = Batch(pair["inner"], pair["outer"])
        with hax.axis_mapping(self.compute_axis_mapping):
            moved, opt_state, _, info = train_step(
                self.optimizer.solver, z, state.opt_state, minibatches, rest
            )
        averaging = state.model_averaging
        new_state = dataclasses.replace(
            state,
            model=eqx.combine(moved, state.model),
            opt_state=opt_state,
            step=state.step + 1,
            training_key=jax.random.split(state.training_key)[1],
            model_averaging=None if averaging is None else averaging.update(moved, state.step),
        )
        new_state = hax.shard(new_state, self.parameter_axis_mapping)
        hook_infos = None
        if not _no_hooks:
            updates = jax.tree.map(lambda new, old: new - old, moved, z)
            with hax.axis_mapping(self.parameter_axis_mapping):
                inside = trainer.InsideJitInfo(grads=None, updates=updates)
                hook_infos = self.hooks.run_jit_hooks(state, inside, force=False)
        metrics = {
            "train/outer_loss": info.outer_loss,
            "train/direction_norm": info.norms.inner,
            "train/all_finite": info.ok,
        }
        result = trainer.TrainStepResult(
            loss=info.inner_loss, new_state=new_state, loss_metrics=metrics, hook_infos=hook_infos
        )
        return hax.shard_with_axis_mapping(result, self.parameter_axis_mapping)
