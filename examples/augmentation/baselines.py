"""Training with a policy frozen: the learned one, none, and those that it is compared with.

All start where the search started, see the same minibatches and take as many steps with the same
optimiser; the last network counts, for its step has fallen to 0. One compiled loop serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.outer.augmentation import Policy
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train.config import ConfigError, resolve
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.workdir import read_json, write_json
from examples.augmentation import compared
from examples.augmentation.examples import Examples

_STREAM = 5  # of the shuffled policy, apart from a run's other draws


class Trainer:
    """Plain training with x frozen, again and again, compiled once.

    Args:
        config: keys `solver.inner`, `steps`, `seed` and `on_device`.
        problem: the losses.
        init: where the search started.
        train: the training examples.
    """

    def __init__(
        self,
        config: Any,
        problem: bf.Problem,
        init: Callable[[jax.Array], Any],
        train: data.FiniteSum,
    ) -> None:
        self._solver = inner_only(
            problem,
            inner=resolve(config.solver.inner),
            inner_weights=train.weights if train.ragged else None,
        )
        self._config = config
        unread = data.partition({"nothing": np.zeros(1)}, 1)  # there is no outer loss
        self._loop = StepRunner(
            self._solver, train, unread, seed=config.seed, on_device=config.on_device
        )
        self._rng, self._run_rng = jax.random.split(jax.random.PRNGKey(config.seed))
        self._start = init(self._rng)

    def __call__(self, outer_params: Any) -> tuple[bf.TrainState, float]:
        """(the state after all steps, seconds that they took without compilation).

        Raises:
            ConfigError: the training diverged.
        """
        start = self._start
        state = self._solver.init(
            start.inner_params, outer_params, model_state=start.model_state, rng=self._run_rng
        )
        before, step = self._loop.seconds, 0
        while step < self._config.steps:
            state, info = self._loop.run(state, step, self._config.steps)
            if not info.finite.inner[-1]:
                raise ConfigError(
                    f"a baseline diverged at step {step + len(info.inner_loss)}: lower "
                    "--config.solver.inner.learning_rate, or leave the baselines out with "
                    "--config.baselines=false"
                )
            step += len(info.inner_loss)
        return state, self._loop.seconds - before

    def close(self) -> None:
        """Ends the loop's threads."""
        self._loop.close()


def run(
    config: Any,
    problem: bf.Problem,
    policy: Policy,
    examples: Examples,
    outer_params: Any,
    init: Callable[[jax.Array], Any],
    train: data.FiniteSum,
    measure: Callable[..., tuple[float, float]],
    workdir: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Errors in [0, 1] of all policies, by name; stored in `baselines.json` as they come.

    Args:
        config: the run's; `uniform_magnitudes` are those that `uniform` may take, chosen by
            validation error.
        problem: the run's losses.
        policy: what x stands for.
        examples: the run's data.
        outer_params: the learned x.
        init: where the search started.
        train: the training examples.
        measure: `measure(state, part) -> (error, loss)`.
        workdir: where `baselines.json` goes; results that are there are not computed again.
        say: prints a line.

    Returns:
        `learned`, `none`, `random` and `uniform`, each with `validation_error`, `test_error` and
        `seconds`; `uniform` also with `magnitude`, the chosen fraction of the limits.
    """
    shares = tuple(config.uniform_magnitudes)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(
            f"--config.uniform_magnitudes={shares}: give fractions of the limits in (0, 1]"
        )
    x = {
        "learned": jax.tree.map(jnp.asarray, outer_params),
        "none": policy.at({}),
        "random": compared.shuffled(policy, outer_params, seed=1000 * _STREAM + config.seed),
        **{f"uniform_{share:g}": compared.uniform(policy, share) for share in shares},
    }
    path = workdir / "baselines.json"
    results = read_json(path) if path.exists() else {}
    trainer = None
    for number, (name, each) in enumerate(x.items(), start=1):
        if name in results:
            continue
        say(f"baseline {number}/{len(x)}: {name}")
        trainer = Trainer(config, problem, init, train) if trainer is None else trainer
        state, seconds = trainer(each)
        results[name] = {
            "validation_error": measure(state, examples.validation)[0],
            "test_error": measure(state, examples.test)[0],
            "seconds": seconds,
        }
        write_json(path, results)
    if trainer is not None:
        trainer.close()
    best = min(shares, key=lambda share: results[f"uniform_{share:g}"]["validation_error"])
    chosen = results[f"uniform_{best:g}"] | {"magnitude": best}
    return {name: results[name] for name in ("learned", "none", "random")} | {"uniform": chosen}


def save_samples(
    workdir: Path, examples: Examples, policy: Policy, outer_params: Any, count: int = 20
) -> None:
    """Writes `samples.npz`: training examples as they are and as the learned policy changes them.

    `before`, `after`: float32 [count, ...]; `labels`: int [count].
    """
    before, labels = (each[:count] for each in examples.train)
    after = policy.apply(
        jax.tree.map(jnp.asarray, outer_params),
        jnp.asarray(before),
        jax.random.key(0),
        jnp.asarray(labels),
    )
    np.savez_compressed(
        workdir / "samples.npz", before=before, after=np.asarray(after), labels=labels
    )
