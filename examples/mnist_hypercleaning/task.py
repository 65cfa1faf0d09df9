"""Data hypercleaning: learn a weight for every training example while the network trains.

A part of the training labels is wrong; a small validation set is clean. With one logit x_i for
each training example,

    G(z, x) = mean_i σ(x_i) CE(z; image_i, label_i) + c‖z‖²      F(z) = mean CE on validation data

and the weights of wrongly labelled examples go down.

References:
    L. Franceschi, M. Donini, P. Frasconi, M. Pontil. Forward and reverse gradient-based
    hyperparameter optimization. ICML 2017.
    M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms. NeurIPS 2022 (this setting).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_flax as bf
from bilevel_flax import data
from bilevel_flax.train.config import ConfigError, check_choice
from bilevel_flax.train.task import InitialValues, Task
from examples.datasets import own, sources
from examples.mnist_hypercleaning import baselines, handover, report
from examples.mnist_hypercleaning.confusion import confused
from examples.mnist_hypercleaning.model import Linear, error, losses, make_model
from examples.mnist_hypercleaning.ranking import wrong_label_auc

# The published sizes; `mnist5k` and data of one's own have others.
SPLITS = (20_000, 5_000, 10_000)
# The coefficient c of ‖z‖²: the published one for the linear model. The deeper ones interpolate
# with it as a weight decay of ordinary size.
REGULARIZATION = {"linear": 0.2, "mlp": 1e-4, "cnn": 1e-4}
PARAMETRISATIONS = {
    "sigmoid": bf.outer.sigmoid,
    "softmax": bf.outer.softmax,
    "meta_weight_net": lambda num_train: bf.outer.meta_weight_net(),
}
# The baselines': nothing is learned, each example brings its weight along.
FIXED = bf.outer.SampleWeights(
    init=lambda: jnp.zeros(()),
    apply=lambda outer_params, batch, losses=None: batch["weight"],
    weights=lambda outer_params, losses=None: jnp.ones(()),
    per_sample=False,
)
HEADLINE = (
    "test_error_handover",
    "test_error_refit",
    "test_error_retrained",
    "test_error",
    "test_error_no_weights",
    "test_error_validation_only",
    "test_error_rounds",
    "test_error_clean",
    "wrong_label_auc",
    "corrected_label_accuracy",
    "plain_step_equivalents",
)
_ERRORS = (*(name for name in HEADLINE if name.startswith("test_error")), "validation_error")


@dataclasses.dataclass(frozen=True)
class Examples:
    """The data of a run: standardised images float32 [n, h, w, c], labels int32 [n]."""

    train_images: np.ndarray
    given_labels: np.ndarray
    true_labels: np.ndarray
    is_wrong: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    raw_train_images: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]


def load_examples(config: Any) -> Examples:
    """Loads, splits, corrupts and standardises what `config` asks for.

    Raises:
        ConfigError: the splits leave no validation or test examples.
        ValueError: unknown data set, missing files, impossible splits, a corruption out of range.
    """
    name = config.data.name
    own_sizes = name == "mnist5k" or own.is_own(name)
    splits = config.data.splits or (None if own_sizes else SPLITS)
    images = sources.load(
        name,
        manual_dir=config.data.manual_dir,
        data_dir=config.data.data_dir,
        splits=splits,
        seed=config.seed,
    )
    for part in ("train", "validation", "test"):
        if not len(getattr(images, f"{part}_labels")):
            raise ConfigError(
                f"--config.data.splits={splits}: no {part} examples; hypercleaning needs all three"
            )
    standardized = data.standardize(
        images.train_images, images.validation_images, images.test_images
    )
    likeness = None
    if config.noise == "instance":
        likeness = confused(standardized[0], images.train_labels, images.num_classes, config.seed)
    try:
        given, is_wrong = data.corrupt_labels(
            images.train_labels,
            config.corruption,
            images.num_classes,
            config.seed,
            config.noise,
            likeness,
        )
    except ValueError as error:
        raise ConfigError(
            f"--config.corruption={config.corruption}, --config.noise={config.noise}: {error}"
        ) from error
    return Examples(
        train_images=standardized[0],
        given_labels=given,
        true_labels=images.train_labels,
        is_wrong=is_wrong,
        validation_images=standardized[1],
        validation_labels=images.validation_labels,
        test_images=standardized[2],
        test_labels=images.test_labels,
        raw_train_images=images.train_images,
        num_classes=images.num_classes,
        class_names=images.class_names,
    )


def make_problem(
    model: nn.Module, weights: bf.outer.SampleWeights, regularization: float
) -> bf.Problem:
    """The two losses; stateful where the network has BatchNorm or dropout.

    For the linear model, of logits: `saba` can then do with a compact memory.
    """

    def cross_entropy(logits, batch):
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))  # bfloat16 networks
        return optax.softmax_cross_entropy_with_integer_labels(wide, batch["label"])

    def weighted(logits, outer_params, batch):
        losses = cross_entropy(logits, batch)
        return weights.apply(outer_params, batch, losses) * losses

    def decay(params):
        matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        return jnp.asarray(regularization * sum(jnp.sum(leaf**2) for leaf in matrices))

    if isinstance(model, Linear):
        return bf.linear_problem(
            lambda z, batch: jnp.asarray(model.apply({"params": z}, batch["image"], train=True)),
            weighted,
            lambda logits, x, batch: cross_entropy(logits, batch),
            inner_penalty=lambda z, x: decay(z),
            per_sample=weights.per_sample,
        )

    def inner_loss(params, outer_params, batch, model_state, rng):
        logits, new_state = model.apply(
            {"params": params, **model_state},
            batch["image"],
            train=True,
            mutable=list(model_state),
            rngs=None if rng is None else {"dropout": rng},
        )
        losses = weighted(logits, outer_params, batch)
        loss = bf.masked_mean(losses, batch.get("mask")) + decay(params)
        return loss, bf.Aux(model_state=dict(new_state))

    def outer_loss(params, outer_params, batch, model_state, rng):
        del outer_params, rng
        logits = model.apply({"params": params, **model_state}, batch["image"], train=False)
        return bf.masked_mean(cross_entropy(logits, batch), batch.get("mask")), bf.Aux()

    if model.stateful:
        return bf.Problem(inner_loss, outer_loss, stateful=True, per_sample=weights.per_sample)
    return bf.Problem(
        lambda z, x, batch: inner_loss(z, x, batch, {}, None)[0],
        lambda z, x, batch: outer_loss(z, x, batch, {}, None)[0],
        per_sample=weights.per_sample,
    )


def make_task(config: Any, examples: Examples | None = None) -> Task:
    """The task that `configs/mnist_hypercleaning.py` describes.

    Args:
        config: keys `model`, `weights`, `regularization`, `corruption`, `noise`, `batch_size`,
            `steps`, `eval_every`, `seed`, `baselines`, `solver.inner` and `data`.
        examples: the data; None: what `config` asks for.

    Raises:
        ConfigError: an unknown model or parametrisation, empty splits.
        ValueError: as `load_examples`.
    """
    examples = load_examples(config) if examples is None else examples
    num_train = len(examples.given_labels)
    model = make_model(config.model, examples.num_classes)
    check_choice(f"--config.weights={config.weights}", config.weights, PARAMETRISATIONS)
    weights = PARAMETRISATIONS[config.weights](num_train)
    regularization = REGULARIZATION[config.model]
    if config.regularization is not None:
        regularization = config.regularization
    problem = make_problem(model, weights, regularization)
    train = {"image": examples.train_images, "label": examples.given_labels}
    validation = {"image": examples.validation_images, "label": examples.validation_labels}
    outer, held_out = hold_out(validation, config.data.get("held_out", 0.0))

    def init(rng: jax.Array) -> InitialValues:
        variables = dict(model.init(rng, examples.train_images[:1], train=False))
        params = variables.pop("params")
        return InitialValues(params, weights.init(), variables if model.stateful else None)

    def learned(state: bf.TrainState) -> np.ndarray:
        if not weights.by_loss:
            return np.array(weights.weights(state.outer_params))
        values = losses(model, state, examples.train_images, examples.given_labels)
        return np.array(weights.weights(state.outer_params, values))

    def evaluate(state: bf.TrainState) -> dict[str, float]:
        return {
            "validation_error": error(
                model, state, examples.validation_images, examples.validation_labels
            ),
            "wrong_label_auc": wrong_label_auc(learned(state), examples.is_wrong),
        }

    def final_metrics(state: bf.TrainState, workdir: Path, log) -> dict[str, Any]:
        learned_weights = learned(state)
        cleaned = handover.clean(config, model, examples, log)
        results: dict[str, Any] = {
            **evaluate(state),
            "learned_weight_auc": wrong_label_auc(learned_weights, examples.is_wrong),
            "test_error": error(model, state, examples.test_images, examples.test_labels),
            **handover.results(cleaned, examples),
        }
        save_learned(workdir, examples, learned_weights, cleaned)
        if config.baselines:
            results |= baselines.run(
                config,
                model,
                problem,
                make_problem(model, FIXED, regularization),
                examples,
                state.outer_params,
                learned_weights,
                init,
                workdir,
                log,
            )
            results["conclusion"] = report.conclusion(results)
        return results

    return Task(
        problem=problem,
        init=init,
        inner=data.partition(train, config.batch_size, seed=config.seed),
        outer=data.partition(outer, config.batch_size, seed=config.seed),
        held_out=(
            None
            if held_out is None
            else data.partition(held_out, min(config.batch_size, len(held_out["label"])))
        ),
        evaluate=evaluate,
        final_metrics=final_metrics,
        best_metric="validation_error",  # as the baselines: stopped early on validation data
        headline=_headline(config),
        units={
            **dict.fromkeys((*_ERRORS, "corrected_label_accuracy"), "fraction"),
            **dict.fromkeys(("inner_loss", "outer_loss"), "nats"),
        },
    )


def _headline(config: Any) -> tuple[str, ...]:
    if not config.baselines:
        return tuple(name for name in HEADLINE if name in ("test_error", *handover.KEYS))
    without = () if config.get("rounds") else ("test_error_rounds",)
    return tuple(name for name in HEADLINE if name not in without)


def hold_out(
    validation: dict[str, np.ndarray], share: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """(what F learns from, what it never sees: the first share of the examples, or None).

    Raises:
        ConfigError: the share leaves F nothing.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"--config.data.held_out={share}: must lie in [0, 1), a share")
    cut = round(share * len(validation["label"]))
    if not cut:
        return validation, None
    return (
        {name: leaf[cut:] for name, leaf in validation.items()},
        {name: leaf[:cut] for name, leaf in validation.items()},
    )


def save_learned(
    workdir: Path,
    examples: Examples,
    weights: np.ndarray,
    cleaned: bf.recipes.Cleaned,
    gallery: int = 40,
) -> None:
    """Writes `learned.npz` (what the report draws) and `suspicious.csv`."""
    suspicious = cleaned.suspicious.index[:gallery]
    np.savez_compressed(
        workdir / "learned.npz",
        weights=weights,
        wrong_probability=cleaned.wrong_probability,
        suggested_label=cleaned.suggested_label,
        is_wrong=examples.is_wrong,
        given_label=examples.given_labels,
        true_label=examples.true_labels,
        suspicious_index=suspicious,
        suspicious_images=examples.raw_train_images[suspicious],
        class_names=np.array(examples.class_names),
    )
    report.write_suspicious_csv(
        workdir / "suspicious.csv",
        weights,
        examples.given_labels,
        wrong_probability=cleaned.wrong_probability,
        suggested_label=cleaned.suggested_label,
    )
