"""Learn how to augment: magnitudes and probabilities of operations, by the validation loss.

With T_x the policy (`bilevel_flax.outer.augmentation`),

    G(z, x) = mean_i CE(z; T_x(example_i), label_i) + c‖z‖²
    F(z) = mean CE on clean validation examples

x are the magnitudes and probabilities, for all classes together or for each class.

References:
    Y. Li, G. Hu, Y. Wang, T. Hospedales, N. M. Robertson, Y. Yang. DADA: differentiable automatic
    data augmentation. ECCV 2020.
    C. Rommel, T. Moreau, J. Paillard, A. Gramfort. CADDA: class-wise automatic differentiable data
    augmentation for EEG signals. ICLR 2022.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.outer.augmentation import (
    IMAGE_OPERATIONS,
    SIGNAL_OPERATIONS,
    Policy,
    image_policy,
    signal_policy,
)
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.task import InitialValues, Task
from examples.augmentation import baselines, images, report, signals
from examples.augmentation.examples import Examples, Part
from examples.augmentation.model import make_model

SIGNALS = "signals"  # the name of the synthetic data set; any other is one of images
# The coefficient c. The signals' classes can be separated: without it their losses, and all that x
# has to go by, fall to nothing.
REGULARIZATION = {"images": 0.0, "signals": 1e-2}
# Where magnitudes start, as a fraction of the limits: a burst that moves by less than its own
# duration tells nothing.
MAGNITUDE = {"images": 0.2, "signals": 0.5}
_AT_ONCE = 1000
HEADLINE = ("learned", "none", "random", "uniform", "search")


def adamw(
    learning_rate: float, steps: int, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """AdamW whose step falls linearly to 0 over the run."""
    rate = optax.linear_schedule(learning_rate, 0.0, steps)
    return optax.adamw(rate, weight_decay=weight_decay)


def make_policy(config: Any, kind: str, num_classes: int) -> Policy:
    """The policy that `config` describes.

    Args:
        config: keys `operations` (None: all of the kind), `limits`, `per_class`, `magnitude`,
            `probability`, `temperature` and `hard`.
        kind: `images` or `signals`.
        num_classes: classes.

    Raises:
        ConfigError: an unknown operation, a limit or a start out of range.
    """
    make, known = {
        "images": (image_policy, IMAGE_OPERATIONS),
        "signals": (signal_policy, SIGNAL_OPERATIONS),
    }[kind]
    try:
        return make(
            tuple(known) if config.operations is None else tuple(config.operations),
            limits=dict(config.limits),
            num_classes=num_classes if config.per_class else None,
            magnitude=MAGNITUDE[kind] if config.magnitude is None else config.magnitude,
            probability=config.probability,
            temperature=config.temperature,
            hard=config.hard,
        )
    except ValueError as error:
        raise ConfigError(f"--config.{error}") from error


def make_problem(
    model: nn.Module, policy: Policy, mean: float, deviation: float, regularization: float
) -> bf.Problem:
    """The two losses; stateful, for the policy draws from the step's key."""

    def decay(params):
        matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        return jnp.asarray(regularization * sum(jnp.sum(leaf**2) for leaf in matrices))

    def cross_entropy(logits, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return bf.masked_mean(losses, batch.get("mask"))

    def inner_loss(params, outer_params, batch, model_state, rng):
        policy_key, dropout_key = jax.random.split(rng)
        changed = policy.apply(outer_params, batch["example"], policy_key, batch["label"])
        logits, new_state = model.apply(
            {"params": params, **model_state},
            (changed - mean) / deviation,
            train=True,
            mutable=list(model_state),
            rngs={"dropout": dropout_key},
        )
        loss = cross_entropy(logits, batch) + decay(params)
        return loss, bf.Aux(model_state=dict(new_state))

    def outer_loss(params, outer_params, batch, model_state, rng):
        del outer_params, rng
        clean = (batch["example"] - mean) / deviation
        logits = model.apply({"params": params, **model_state}, clean, train=False)
        return cross_entropy(logits, batch), bf.Aux()

    return bf.Problem(inner_loss, outer_loss, stateful=True)


def make_measure(model: nn.Module, mean: float, deviation: float):
    """`measure(state, part) -> (error, loss)`, means over a part's examples, in float."""

    @jax.jit
    def batch_of(params, model_state, examples, labels):
        variables = {"params": params, **model_state}
        logits = jnp.asarray(model.apply(variables, (examples - mean) / deviation, train=False))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([jnp.sum(logits.argmax(-1) != labels), jnp.sum(losses)])

    def measure(state: bf.TrainState, part: Part) -> tuple[float, float]:
        examples, labels = part
        total = np.zeros(2)
        for at in range(0, len(labels), _AT_ONCE):
            some = slice(at, at + _AT_ONCE)
            sums = batch_of(state.inner_params, state.model_state, examples[some], labels[some])
            total += np.asarray(sums)
        error, loss = (total / len(labels)).tolist()
        return error, loss

    return measure


def make_task(config: Any, examples: Examples | None = None) -> Task:
    """The task that `configs/augmentation.py` describes.

    Args:
        config: keys `model`, `regularization`, `planted`, `per_class`, `batch_size`, `steps`,
            `seed`, `baselines`, `uniform_magnitudes`, `solver.inner`, `data`, and those of
            `make_policy`.
        examples: the data; None: what `config` asks for.

    Raises:
        ConfigError: an unknown model, operation or plan, or a value out of its range.
        ValueError: as `data.load`.
    """
    kind = "signals" if config.data.name == SIGNALS else "images"
    if examples is None:
        examples = signals.load(config) if kind == "signals" else images.load(config)
    policy = make_policy(config, kind, examples.num_classes)
    model = make_model(config.model, kind, examples.num_classes)
    if not 1 <= config.batch_size <= len(examples.train[1]):
        raise ConfigError(
            f"--config.batch_size={config.batch_size}: must be 1 .. {len(examples.train[1])}, "
            "the training examples"
        )
    regularization = REGULARIZATION[kind]
    if config.regularization is not None:
        regularization = config.regularization
    problem = make_problem(model, policy, examples.mean, examples.deviation, regularization)
    measure = make_measure(model, examples.mean, examples.deviation)

    def parted(part: Part) -> data.FiniteSum:
        size = min(config.batch_size, len(part[1]))
        return data.partition({"example": part[0], "label": part[1]}, size, seed=config.seed)

    def init(rng: jax.Array) -> InitialValues:
        variables = dict(model.init(rng, examples.train[0][:1], train=False))
        params = variables.pop("params")
        return InitialValues(params, policy.init(), variables)

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        error, loss = measure(state, examples.validation)
        curves = {"validation_error": error, "validation_loss": loss}
        for name, values in policy.learned(state.outer_params).items():
            for leaf, value in values.items():
                if leaf == "magnitude" and not policy.graded(name):
                    continue
                for label, number in enumerate(np.atleast_1d(value)):
                    where = name if np.ndim(value) == 0 else f"{name} {examples.class_names[label]}"
                    most = policy.limit(name) if leaf == "magnitude" else 1.0
                    curves[f"_{leaf}/{where}"] = float(number) / most
        return curves

    def final_metrics(state: bf.TrainState, workdir: Path, log) -> dict[str, Any]:
        error, _ = measure(state, examples.validation)
        test_error = {"search": measure(state, examples.test)[0]}
        baselines.save_samples(workdir, examples, policy, state.outer_params)
        results: dict[str, Any] = {
            "learned": policy.learned(state.outer_params),
            "planted": {name: dict(values) for name, values in examples.planted.items()},
            "limits": dict(zip(policy.names, policy.limits, strict=True)),
            "units": {each.name: each.unit for each in policy.operations},
            "class_names": list(examples.class_names) if config.per_class else None,
            "validation_error": {"search": error},
            "test_error": test_error,
        }
        if config.baselines:
            compared = baselines.run(
                config,
                problem,
                policy,
                examples,
                state.outer_params,
                init,
                parted(examples.train),
                measure,
                workdir,
                log,
            )
            for part in ("validation_error", "test_error"):
                results[part] |= {name: values[part] for name, values in compared.items()}
            results["uniform_magnitude"] = compared["uniform"]["magnitude"]
            results["conclusion"] = report.conclusion(results)
        return results

    shown = HEADLINE if config.baselines else ("search",)
    return Task(
        problem=problem,
        init=init,
        inner=parted(examples.train),
        outer=parted(examples.validation),
        evaluate=evaluate,
        final_metrics=final_metrics,
        headline=tuple(f"test_error.{name}" for name in shown),
        units={
            "validation_error": "fraction",
            "test_error": "fraction",
            "inner_loss": "nats",
            "outer_loss": "nats",
        },
    )
