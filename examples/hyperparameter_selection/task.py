"""Hyperparameter selection: an l2 penalty for each feature (or class) of a linear classifier.

    G(z, x) = mean_train loss(z) + ½ Σ_k e^{x_k} ‖z_k‖²        F(z) = mean_validation loss(z)

Two labels: logistic loss, z in R^features, one penalty for each feature. More: softmax, z in
R^{features x classes}, one penalty for each class.

References:
    F. Pedregosa. Hyperparameter optimization with approximate gradient. ICML 2016.
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022 (ijcnn1, covtype).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.task import InitialValues, Task
from examples.hyperparameter_selection import exact, features


def scores(z: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Linear in z [features] or [features, classes]: [batch] or [batch, classes]."""
    return batch["input"] @ z


def losses(scores: jax.Array, x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The loss of each example of a minibatch, [batch].

    Args:
        scores: [batch], of inputs times the label -1 or 1; or [batch, classes].
        x: not used.
        batch: with more than two classes, "label" int [batch].
    """
    del x
    if scores.ndim == 1:
        return jax.nn.softplus(-scores)
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])


def penalty(z: jax.Array, x: jax.Array) -> jax.Array:
    """½ Σ_k e^{x_k} ‖z_k‖²."""
    return 0.5 * jnp.sum(jnp.broadcast_to(jnp.exp(x), z.shape) * z**2)


def make_problem() -> bf.Problem:
    """G and F."""
    return bf.linear_problem(scores, losses, losses, inner_penalty=penalty)


def num_penalties(table: features.Features) -> int:
    """The length of x."""
    return table.num_classes or table.train.inputs.shape[1]


def exact_problem(table: features.Features) -> exact.Exact:
    """The table's h, in float64."""
    loss = exact.softmax if table.num_classes else exact.logistic
    return exact.Exact(loss, table.train, table.validation, num_penalties(table))


# breast_cancer's h has dozens of local minima: of 60 draws this one led to the lowest.
_DRAWS = {"breast_cancer": (11,)}
_CONSTANTS = {"breast_cancer": (-8.0, -4.0), "covtype": (-10.0,)}


def starts(name: str, length: int) -> list[float | np.ndarray]:
    """Where a search for the lowest h on a table begins."""
    draws = [np.random.default_rng(seed).uniform(-8, 0, length) for seed in _DRAWS.get(name, ())]
    return [*_CONSTANTS.get(name, exact.STARTS), *draws]


def as_arrays(part: exact.Data, num_classes: int) -> dict[str, np.ndarray]:
    """What the losses are given, in JAX's default float type."""
    dtype = jnp.result_type(float)
    if num_classes:
        return {"input": part.inputs.astype(dtype), "label": part.labels.astype(np.int32)}
    # The label's sign is multiplied in once, not in every step.
    return {"input": (part.inputs * part.labels[:, None]).astype(dtype)}


def make_task(config: Any, table: features.Features | None = None) -> Task:
    """The task that `configs/hyperparameter_selection.py` describes.

    Args:
        config: keys `data.name`, `data.manual_dir`, `data.data_dir`, `data.seed`, `batch_size`,
            `start` (the constant that x starts from), `bounds` (the box for x), `seed` and
            `optimum` (whether `finish` computes it).
        table: the data; None: what `config.data` names.

    Raises:
        ConfigError: unknown or missing data, a start that is not finite.
        ValueError: an impossible batch size.
    """
    if not np.isfinite(config.start):
        raise ConfigError(f"--config.start={config.start}: x must start from a finite number")
    if table is None:
        source = config.data
        table = features.load(source.name, source.manual_dir, source.seed, source.get("data_dir"))
    length, width = num_penalties(table), table.train.inputs.shape[1]
    reference = exact_problem(table)

    def init(rng: jax.Array) -> InitialValues:
        del rng
        shape = (width, length) if table.num_classes else (width,)
        return InitialValues(
            jnp.zeros(shape), jnp.full(length, config.start, jnp.result_type(float))
        )

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        x = np.asarray(state.outer_params, np.float64)
        try:
            return {"validation_loss": reference.value(x)}
        except ArithmeticError:
            return {"validation_loss": float("nan")}

    def final_metrics(state: bf.TrainState, workdir: Path, log) -> dict[str, Any]:
        del workdir
        x = np.asarray(state.outer_params, np.float64)
        results: dict[str, Any] = {**evaluate(state), "penalties": np.exp(x).tolist()}
        if config.optimum:
            log("computing the optimum in float64 (--config.optimum=False leaves it out)")
            # The run's own end is one of the starts: no run ends below the optimum.
            begin = [*starts(config.data.name, length), x]
            best = reference.optimum(length, begin, tuple(config.bounds))
            results |= {"optimum": best.value, "gap": results["validation_loss"] - best.value}
        return results

    return Task(
        problem=make_problem(),
        init=init,
        inner=data.partition(
            as_arrays(table.train, table.num_classes), config.batch_size, seed=config.seed
        ),
        outer=data.partition(
            as_arrays(table.validation, table.num_classes), config.batch_size, seed=config.seed
        ),
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=("validation_loss", "optimum", "gap") if config.optimum else ("validation_loss",),
    )
