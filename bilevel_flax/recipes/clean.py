"""Which labels are wrong, what they should be, and the best network: four trainings, no knob.

1. A network is trained on given labels through a confusion matrix, which is learned with it by
   expectation maximisation, and on the clean examples as they are. A tenth of the given labels is
   held out, and says when it stops and what a clean example is worth (`through_noise.py`).
2. Where it agrees with the given label, the label is kept: these and the clean ones train a second
   for half as long, which begins half way between the first and a new one. (With so many clean
   examples that there is nothing to choose in 1, for as long.)
3. With its word, and a noise model fitted to it (`noise_model.py`), each label's posterior. The
   labels that it is sure of, given or not, and the clean ones train it on, with mixup. Where it
   would learn labels by heart (the first was best early, or the steps are many for so few data):
   in three parts, each on a half, so that labels are judged by a network not just taught them.
4. That once more, shorter and without mixup, from which a network that would not have learned
   labels by heart, a linear one, gains nothing: the network to hand over. With the second, and
   on each half the one that was not taught it, it says which labels are wrong.

Where the first expects more labels to be right as they are than as a later one would have them,
3 and 4 train on all examples by its word and the later one's, and so labels are judged
(`first_word.py`).

Together they cost about four plain trainings of the full length, or fewer. Why no learned weights:
started from them, or with them on top of the matrix, instance noise ended with more errors
(`benchmarks/results/cleaning.md`: what was tried, and where plain rounds win).

References:
    G. Patrini et al. CVPR 2017; A. J. Bekker, J. Goldberger. ICASSP 2016 (see `noise_model.py`).
    D. Hendrycks, M. Mazeika, D. Wilson, K. Gimpel. Using trusted data to train deep networks on
    labels corrupted by severe noise. NeurIPS 2018 (a matrix and a few clean labels).
    J. Ash, R. Adams. NeurIPS 2020; H. Zhang et al. ICLR 2018 (see `training.py`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from bilevel_flax.base import PyTree, TrainState
from bilevel_flax.checks import as_count
from bilevel_flax.checks import optimizer as checked_optimizer
from bilevel_flax.data.draws import check_seed
from bilevel_flax.recipes import checks, noise_model, sources
from bilevel_flax.recipes.cleaned import SURE, Cleaned
from bilevel_flax.recipes.first_word import FirstWord, mean
from bilevel_flax.recipes.networks import as_network
from bilevel_flax.recipes.through_noise import ThroughNoise
from bilevel_flax.recipes.training import Start, Trainer

# Passes over the data after which the first training only learns wrong labels by heart, and the
# steps that a network needs all the same.
_PASSES, _LEAST_STEPS = 15, 300
# Given labels that say when the first training stops: the share, and at most so many.
_HELD_SHARE, _MOST_HELD = 0.1, 1000
# That the second network is this sure of another label makes the given one surely wrong.
_CLEARLY = 0.8
# The start of the second network, and of one on the other half: this much of a new one.
_FRESH, _FRESH_ON_A_HALF = 0.5, 0.1
# What the later trainings take, of a full one, all but the last with mixup; on halves, if one would
# go through the data more than 15 times, or the first was best before this much of its steps.
_SHARES, _SHARES_ON_HALVES = (1.0, 0.5), (0.35, 0.35, 0.35, 0.5)
_EARLY = 0.45
_STEP = 1e-3  # AdamW's first, which falls to 0
_DECAY = 1e-4


def clean(
    model: Any,
    train: Any,
    clean: Any,
    *,
    steps: int = 3000,
    batch_size: int = 64,
    optimizer: optax.GradientTransformation
    | Callable[[int], optax.GradientTransformation]
    | None = None,
    penalty: Callable[[PyTree], Any] | None = None,
    inputs: str = "image",
    label: str = "label",
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> Cleaned:
    """Finds the wrong labels of a training set by a few clean examples, and trains without them.

    Args:
        model: the classifier: a Linen or NNX module that takes inputs [batch, ...] and returns
            logits [batch, classes], or two functions (`recipes.Network`). A Linen module may take
            `train`, `training`, `is_training`, `deterministic` or `use_running_average`.
        train: examples with labels some of which are wrong: a dict of arrays, (inputs, labels), a
            Hugging Face `Dataset`, a TFDS data source or a Grain `MapDataset`. Inputs are numbers
            [n, ...], scaled as the network wants them; labels are integers from 0.
        clean: a few examples with right labels, of every class.
        steps: of one training at full length; the whole takes about four times as many, or fewer.
        batch_size: examples a step.
        optimizer: z's, or a function of a training's number of steps that returns it, for a step
            that falls; None: AdamW(1e-3, decay 1e-4), its step falling linearly to 0.
        penalty: `penalty(params) -> scalar`, added to the mean loss; None: nothing.
        inputs: the key, or column, of the inputs.
        label: that of the labels.
        seed: of the networks, the minibatches and dropout.
        log: prints a line; None: prints nothing.

    Returns:
        `Cleaned`.

    Raises:
        TypeError: `model` or a data set is of a kind that is not known.
        ValueError: a key is missing; a class has no clean example; inputs that are not finite; the
            two sets' inputs differ in shape, or those of one are integers, of the other not; the
            network has another number of classes.

    Warns:
        UserWarning: clean examples also stand in the training set; one has two labels.

    Example:
        >>> import flax.linen as nn, numpy as np, optax, bilevel_flax as bf
        >>> rng = np.random.default_rng(0)
        >>> true = rng.integers(0, 2, 200)
        >>> x = (rng.normal(size=(200, 3)) + 3 * true[:, None]).astype(np.float32)
        >>> given = np.where(np.arange(200) < 40, 1 - true, true)  # the first 40 are wrong
        >>> cleaned = bf.recipes.clean(
        ...     nn.Dense(2),
        ...     (x[:180], given[:180]),
        ...     (x[180:], true[180:]),
        ...     steps=200,
        ...     optimizer=optax.adam(0.03),
        ... )
        >>> int((cleaned.suspicious.index[:40] < 40).sum()) >= 38
        True
    """
    steps, batch_size = as_count("steps", steps), as_count("batch_size", batch_size)
    checks.functions(penalty=penalty, log=log)
    network = as_network(model)
    noisy_inputs, given = sources.read("train", train, inputs, label)
    clean_inputs, known = sources.read("clean", clean, inputs, label)
    checks.inputs_alike("clean", clean_inputs, noisy_inputs)
    num_classes = checks.num_classes(given, known)
    checks.network(network, noisy_inputs, num_classes)
    common = np.result_type(noisy_inputs, clean_inputs)
    noisy_inputs, clean_inputs = noisy_inputs.astype(common), clean_inputs.astype(common)
    notes = []
    twins = sources.positions(noisy_inputs, clean_inputs)
    if (twins >= 0).all():
        raise ValueError("every training example also stands in clean: no label is left to judge")
    same = sources.positions(clean_inputs, clean_inputs)
    disputed = same[known != known[same]]
    if len(disputed):
        twins[np.isin(twins, disputed)] = -1
        notes.append(
            f"{len(disputed)} examples of clean are the same as another of it with another label, "
            f"the first of them as clean[{disputed[0]}]: one of the two is wrong, or the inputs do "
            "not tell the classes apart"
        )
        warnings.warn(notes[-1], stacklevel=2)
    if (twins >= 0).any():
        notes.append(
            f"{int((twins >= 0).sum())} training examples also stand in clean, whose labels they "
            "are judged by; they are not trained on twice"
        )
        warnings.warn(notes[-1], stacklevel=2)
    trainer = Trainer(
        network,
        np.concatenate([noisy_inputs, clean_inputs]),
        len(known),
        num_classes,
        batch_size,
        _by_steps(optimizer),
        penalty or (lambda params: 0.0),
        check_seed(seed),
    )
    return _trainings(trainer, steps, given, known, twins, tuple(notes), log or (lambda line: None))


def _by_steps(optimizer: Any) -> Callable[[int], optax.GradientTransformation]:
    if optimizer is None:
        return lambda steps: optax.adamw(
            optax.linear_schedule(_STEP, 0.0, steps), weight_decay=_DECAY
        )
    if not isinstance(optimizer, optax.GradientTransformation) and callable(optimizer):
        if "learning_rate" in inspect.signature(optimizer).parameters:  # steps would be its step
            checked_optimizer("optimizer", optimizer)
        return lambda steps: checked_optimizer("optimizer", optimizer(steps))
    checked_optimizer("optimizer", optimizer)
    return lambda steps: optimizer


def _trainings(
    trainer: Trainer,
    steps: int,
    given: np.ndarray,
    known: np.ndarray,
    twins: np.ndarray,
    notes: tuple[str, ...],
    log: Callable[[str], None],
) -> Cleaned:
    noisy, usable = trainer.inputs[: len(given)], twins < 0
    clean_rows = np.arange(len(given), len(given) + len(known))
    half, spent = max(1, steps // 2), 0.0

    def judged(state: TrainState, cost: float, what: str) -> np.ndarray:
        nonlocal spent
        spent += cost / steps
        probabilities = trainer.probabilities(state, noisy)
        log(f"{what}: it agrees with {(probabilities.argmax(1) == given).mean():.1%} of the labels")
        return probabilities

    passes = -(-_PASSES * len(given) // trainer.batch_size)  # in steps
    longest = min(steps, max(passes, _LEAST_STEPS))
    rows = np.random.default_rng(trainer.seed).permutation(np.flatnonzero(usable))
    held = rows[: min(_MOST_HELD, int(_HELD_SHARE * len(rows)))]
    labels = np.concatenate([given, known])
    found = ThroughNoise(trainer, longest).fit(rows, labels, held=held, pilot=half)
    first = judged(found.state, found.cost, "1: through a confusion matrix")

    kept = usable & (first.argmax(1) == given)
    rows = np.append(np.flatnonzero(kept), clean_rows)
    # What the pilot would have cost goes to the second.
    length = half if found.piloted else steps
    state = trainer.fit(rows, labels, length, start=Start(found.state, _FRESH))
    said = second = judged(state, length, "2: on the labels that the first keeps")
    untaught = second.copy()  # on a half, by the part that left it out

    word, left_alone = FirstWord(first, given, held), False
    in_halves = steps > passes or bool(found.state.step < _EARLY * longest)
    shares = _SHARES_ON_HALVES if in_halves else _SHARES
    half_of = np.random.default_rng(trainer.seed).permutation(len(given)) % 2
    for part, share in enumerate(shares):
        posterior = noise_model.posterior(said, given, *_noise(said, given, kept))
        taken = posterior.max(1) > SURE
        left_alone = word.prefers_given(said, posterior)
        if left_alone:
            posterior, taken = word.posterior(said), np.ones(len(given), bool)
        likeliest = np.concatenate([posterior.argmax(1), known]).astype(np.int32)
        length = max(1, int(share * steps))
        mixed = part < len(shares) - 1
        out = (half_of != part % 2) & (in_halves and mixed and not left_alone)
        rows = np.append(np.flatnonzero(usable & taken & ~out), clean_rows)
        start = Start(state, _FRESH_ON_A_HALF if out.any() else 0.0)
        state = trainer.fit(rows, likeliest, length, start=start, mixed=mixed)
        which = ("3" if not in_halves else f"3, part {part + 1}") if mixed else "4"
        said = judged(state, length, f"{which}: on the likeliest labels now")
        untaught[out] = said[out]

    noise = _noise(said, given, kept)
    posterior = noise_model.posterior(said, given, *noise)
    words = (second, said, untaught) if in_halves else (second, said)
    doubted = noise_model.posterior(mean(*words), given, *noise)
    if left_alone or word.prefers_given(said, posterior):
        posterior, doubted = word.posterior(), word.posterior(*words)
        notes += (
            "more labels are expected to be right as they are than as the network would have them: "
            "suggested labels are mostly the given ones",
        )
    for probabilities in (posterior, doubted):
        probabilities[~usable] = np.eye(trainer.num_classes)[known[twins[~usable]]]
    doubt = 1 - doubted[np.arange(len(given)), given]
    return Cleaned(
        params=state.inner_params,
        model_state=state.model_state,
        wrong_probability=doubt.astype(np.float32),
        suggested_label=posterior.argmax(1).astype(np.int32),
        confusion=noise_model.confusion(posterior, given),
        resemblance=noise[1],
        plain_step_equivalents=spent,
        notes=notes,
        _predict=lambda inputs: trainer.probabilities(state, inputs),
    )


def _noise(said: np.ndarray, given: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, float]:
    """The confusion matrix, and γ by the labels that are clearly wrong and not trained on."""
    matrix, likeliest = noise_model.confusion(said, given), said.argmax(1)
    wrong = ~kept & (likeliest != given) & (said.max(1) > _CLEARLY)
    return matrix, noise_model.resemblance(said[wrong], given[wrong], matrix)
