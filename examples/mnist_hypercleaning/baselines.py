"""What the learned weights are compared with: plain training, same loop, same steps.

Each baseline is stopped where its error on held validation data was lowest:

* no_weights: all given labels, weights 1.
* clean: all true labels, weights 1; what could be had at best.
* retrained: the given labels, from scratch, with the learned weights frozen.
* refit: the same together with the validation data at weight 1: what one would hand over, once
  there is nothing left to choose. It is not stopped early.
* validation_only: the validation data as training data. A fifth of it chooses the number of
  steps, then all of it is trained on for as long.
* rounds, where `config.rounds` asks for it: what a good engineer would script, filter, relabel and
  train again (`rivals.py`, from a noisy network times one of clean examples), with AdamW.
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
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.train.config import ConfigError, resolve
from bilevel_flax.train.step_runner import StepRunner
from bilevel_flax.train.workdir import read_json, write_json
from examples.mnist_hypercleaning import rivals
from examples.mnist_hypercleaning.model import error


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Plain training from the run's own start, stopped early."""

    config: Any
    model: nn.Module
    init: Callable[[jax.Array], Any]

    def __call__(self, problem, outer_params, examples, held, steps=None):
        """Trains on the examples; returns (state, steps at the lowest error on `held`).

        With `steps`, that many are taken, and the last state is returned.
        """
        config = self.config
        total = config.steps if steps is None else steps
        batch_size = min(config.batch_size, len(examples["label"]))
        parts = data.partition(examples, batch_size, seed=config.seed)
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
        loop = StepRunner(solver, parts, unread, seed=config.seed, on_device=config.on_device)
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
    fixed: bf.Problem,
    examples: Any,
    outer_params: Any,
    weights: np.ndarray,
    init: Callable[[jax.Array], Any],
    workdir: Path,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Test errors of all baselines, in [0, 1]; each is stored in `baselines.json` as it comes.

    Args:
        config: the run's.
        model: the network.
        problem: the run's losses.
        fixed: the same with the weights that the data bring along, as `weight`.
        examples: the run's data.
        outer_params: the learned ones, frozen for `retrained`.
        weights: float [n], the learned ones, for `refit`.
        init: where the run started.
        workdir: where `baselines.json` goes; results that are there are not computed again.
        say: prints a line.
    """
    train = Trainer(config, model, init)
    given, true = examples.given_labels, examples.true_labels
    held = (examples.validation_images, examples.validation_labels)

    def plainly(images, labels, held, *, shares=None, steps=None):
        shares = np.ones(len(labels)) if shares is None else shares
        parts = {"image": images, "label": labels, "weight": shares.astype(np.float32)}
        return train(fixed, jnp.zeros(()), parts, held, steps)

    def validation_only():
        cut = len(held[1]) // 5
        _, steps = plainly(held[0][cut:], held[1][cut:], (held[0][:cut], held[1][:cut]))
        return plainly(*held, held, steps=steps)[0]

    def refit():
        images = np.concatenate([examples.train_images, held[0]])
        shares = np.concatenate([weights, np.ones(len(held[1]))])
        labels = np.concatenate([given, held[1]])
        return plainly(images, labels, held, shares=shares, steps=config.steps)[0]

    learned = {"image": examples.train_images, "label": given}
    jobs = {
        "no_weights": lambda: plainly(examples.train_images, given, held)[0],
        "validation_only": validation_only,
        "clean": lambda: plainly(examples.train_images, true, held)[0],
        "retrained": lambda: train(problem, outer_params, learned, held)[0],
        "refit": refit,
    }

    def test_error(state) -> float:
        return error(model, state, examples.test_images, examples.test_labels)

    def rounds() -> float:
        bout = rivals.Bout(examples, config.model, config.steps, config.batch_size, config.seed)
        predicted = rivals.METHODS["rounds_both"](bout).predict(examples.test_images).argmax(1)
        return float(np.mean(predicted != examples.test_labels))

    def measure(name: str) -> float:
        return rounds() if name == "rounds" else test_error(jobs[name]())

    names = [*jobs, *(["rounds"] if config.get("rounds") else [])]
    path = workdir / "baselines.json"
    errors = read_json(path) if path.exists() else {}
    for number, name in enumerate(names, start=1):
        key = f"test_error_{name}"
        if key not in errors:
            say(f"baseline {number}/{len(names)}: {name}")
            errors[key] = measure(name)
            write_json(path, errors)
    return errors
