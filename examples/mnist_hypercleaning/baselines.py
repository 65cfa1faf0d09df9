"""What the learned weights are compared with: plain training, same loop, same steps.

Each baseline is stopped where its error on held validation data was lowest:

* no_weights: all given labels, weights 1.
* clean: all true labels, weights 1; what could be had at best.
* retrained: the given labels, from scratch, with the learned weights frozen.
* validation_only: the validation data as training data. A fifth of it chooses the number of
  steps, then all of it is trained on for as long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.config import ConfigError, resolve
from bilevel_flax.loop import Loop
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.workdirs import read_json, write_json
from examples.mnist_hypercleaning.model import error


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Plain training from the run's own start, stopped early."""

    config: Any
    model: nn.Module
    init: Callable[[jax.Array], Any]

    def __call__(self, problem, outer_params, images, labels, held, steps=None):
        """Trains on (images, labels); returns (state, steps at the lowest error on `held`).

        With `steps`, that many are taken, and the last state is returned.
        """
        config = self.config
        total = config.steps if steps is None else steps
        parts = data.partition(
            {"image": images, "label": labels},
            min(config.batch_size, len(labels)),
            seed=config.seed,
        )
        solver = inner_only(
            problem,
            inner=resolve(config.solver.inner),
            inner_weights=parts.weights if parts.ragged else None,
        )
        rng, run_rng = jax.random.split(jax.random.PRNGKey(config.seed))
        start = self.init(rng)
        state = solver.init(
            start.inner_params, outer_params, model_state=start.model_state, rng=run_rng
        )
        unread = data.partition({"nothing": np.zeros(1)}, 1)  # there is no outer loss
        loop = Loop(solver, parts, unread, seed=config.seed, on_device=config.on_device)
        best_error, best_state, best_step, step = np.inf, None, 0, 0
        while step < total:
            stop = min(total, step + config.eval_every - step % config.eval_every)
            state, info = loop.run(state, step, stop)
            if not info.finite.inner[-1]:
                break  # what was best before stands
            step += len(info.inner_loss)
            if step % config.eval_every and step < total:
                continue
            now = error(self.model, state, *held)
            if steps is not None or now < best_error:
                best_error, best_step = now, step
                # A copy: the loop donates its state.
                best_state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
        loop.close()
        if best_state is None:
            raise ConfigError(
                f"a baseline diverged before step {config.eval_every}: lower the inner step, or "
                "leave the baselines out with --config.baselines=false"
            )
        return best_state, best_step


def run(
    config: Any,
    model: nn.Module,
    problem: bf.Problem,
    unweighted: bf.Problem,
    examples: Any,
    outer_params: Any,
    init: Callable[[jax.Array], Any],
    workdir: Path,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Test errors of all baselines, in [0, 1]; each is stored in `baselines.json` as it comes.

    Args:
        config: the run's.
        model: the network.
        problem: the run's losses.
        unweighted: the same with every weight 1.
        examples: the run's data.
        outer_params: the learned ones, frozen for `retrained`.
        init: where the run started.
        workdir: where `baselines.json` goes; results that are there are not computed again.
        say: prints a line.
    """
    train = Trainer(config, model, init)
    nothing = jnp.zeros(())
    images, held = examples.train_images, (examples.validation_images, examples.validation_labels)

    def on_train(labels):
        return train(unweighted, nothing, images, labels, held)[0]

    def validation_only():
        cut = len(held[1]) // 5
        held_fifth = (held[0][:cut], held[1][:cut])
        _, steps = train(unweighted, nothing, held[0][cut:], held[1][cut:], held_fifth)
        return train(unweighted, nothing, *held, held, steps)[0]

    jobs = {
        "no_weights": lambda: on_train(examples.given_labels),
        "validation_only": validation_only,
        "clean": lambda: on_train(examples.true_labels),
        "retrained": lambda: train(problem, outer_params, images, examples.given_labels, held)[0],
    }
    path = workdir / "baselines.json"
    found = read_json(path) if path.exists() else {}
    for number, (name, job) in enumerate(jobs.items(), start=1):
        key = f"test_error_{name}"
        if key not in found:
            say(f"baseline {number}/{len(jobs)}: {name}")
            found[key] = error(model, job(), examples.test_images, examples.test_labels)
            write_json(path, found)
    return found
