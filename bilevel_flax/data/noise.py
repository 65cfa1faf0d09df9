"""Label noise with a known answer, and the standardisation of features."""

import difflib

import numpy as np

from bilevel_flax.data import draws

_STREAM = 3
_KINDS = ("symmetric", "class", "instance")
_SPREAD = 0.2  # of the rates of `instance` noise, to either side of p


def corrupt_labels(
    labels: np.ndarray,
    p: float,
    num_classes: int,
    seed: int,
    kind: str = "symmetric",
    confusion: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes a share of the labels wrong, and says which.

    `symmetric`: with probability p the label is drawn anew, uniformly over all classes, its own
    included, so that a share p (1 - 1/num_classes) is wrong: .45 for p = .5 and ten classes.
    `class`: with probability p label y becomes (y + 1) mod num_classes. Above p = .5 the wrong
    label is the commonest of its class, and only clean validation data can tell the two apart.
    `instance`: example i has a probability of its own, uniform in p ± .2 (cut to [0, 1]), and its
    wrong label is drawn from what the example itself looks like, row i of `confusion`.

    Args:
        labels: integers [n] in [0, num_classes).
        p: the probability of a draw, in [0, 1].
        num_classes: classes, at least 2.
        seed: non-negative.
        kind: "symmetric", "class" or "instance".
        confusion: float [n, num_classes]: for "instance", some network's probabilities. The true
            label's own is left out.

    Returns:
        (noisy labels int32 [n], bool [n]: where they differ from `labels`).

    Raises:
        TypeError: labels are no integers.
        ValueError: `p`, `kind`, `num_classes` or a label is out of range; "instance" without a
            `confusion` of the right shape.

    Example:
        >>> import numpy as np
        >>> noisy, wrong = corrupt_labels(np.zeros(1000, np.int32), .5, 10, seed=0)
        >>> bool(((noisy != 0) == wrong).all()), .4 < float(wrong.mean()) < .5
        (True, True)

    References:
        L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and Reverse Gradient-Based
        Hyperparameter Optimization", ICML 2017 (hypercleaning with resampled labels).
        X. Xia et al., "Part-Dependent Label Noise: Towards Instance-Dependent Label Noise",
        NeurIPS 2020 (rates that differ by example, labels by what is seen).
    """
    if kind not in _KINDS:
        near = difflib.get_close_matches(str(kind), _KINDS, 1, 0.3) or _KINDS[:1]
        choices = " or ".join(f'"{name}"' for name in _KINDS)
        raise ValueError(f'kind must be {choices}, got {kind!r}: use "{near[0]}"')
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in [0, 1], got {p}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    seed = draws.check_seed(seed)
    labels = check_labels(labels, num_classes)

    n, rate = len(labels), p
    if kind == "symmetric":
        drawn = (draws.uniform(n, seed, _STREAM, 1) * num_classes).astype(np.int32)
    elif kind == "class":
        drawn = (labels + 1) % num_classes
    else:
        drawn = _drawn_by_likeness(
            labels, confusion, num_classes, draws.uniform(n, seed, _STREAM, 1)
        )
        rate = p + _SPREAD * (2 * draws.uniform(n, seed, _STREAM, 2) - 1)
    noisy = np.where(draws.uniform(n, seed, _STREAM, 0) < rate, drawn, labels).astype(np.int32)
    return noisy, noisy != labels


def _drawn_by_likeness(labels, confusion, num_classes, uniform) -> np.ndarray:
    shape = (len(labels), num_classes)
    if confusion is None or np.shape(confusion) != shape:
        raise ValueError(
            f'confusion must be [{shape[0]}, {shape[1]}] for kind="instance", got '
            f"{None if confusion is None else list(np.shape(confusion))}: pass a network's "
            "probabilities of the examples"
        )
    others = np.array(confusion, np.float64) + 1e-6
    others[np.arange(len(labels)), labels] = 0.0
    cumulated = np.cumsum(others / others.sum(1, keepdims=True), axis=1)
    return np.minimum((cumulated <= uniform[:, None]).sum(1), num_classes - 1).astype(np.int32)


def check_labels(labels: np.ndarray, num_classes: int, name: str = "labels") -> np.ndarray:
    """`labels` as int32 [n], or an error that says which one is out of range.

    Args:
        labels: integers [n].
        num_classes: labels must lie in [0, num_classes).
        name: what the error calls them.

    Raises:
        TypeError: not a vector of integers.
        ValueError: a label is out of range; names its position and value.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> bf.data.check_labels(np.array([0, 2, 1]), num_classes=3).dtype
        dtype('int32')
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be integers [n], got {labels.dtype} {list(labels.shape)}: "
            "pass class numbers, not one-hot rows or floats"
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"{name}[{at}] is {labels[at]}, out of range for num_classes={num_classes}: "
            f"labels must lie in [0, {num_classes})"
        )
    return labels.astype(np.int32)


def standardize(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shifts and scales every feature by the training set's mean and standard deviation.

    A feature that does not vary in training, beyond rounding, is only shifted. Images are
    flattened by the caller or not, as it likes: each entry beyond the leading axis is a feature.

    Args:
        train: numbers [n, ...]; sets the statistics.
        *others: numbers [m, ...] with the same trailing shape.

    Returns:
        `(train, *others)`, all float32.

    Raises:
        ValueError: `train` is empty, or a trailing shape differs.

    Example:
        >>> import numpy as np
        >>> standardize(np.array([[0.0], [2.0]]), np.array([[4.0]]))[1].tolist()
        [[3.0]]
    """
    train = np.asarray(train)
    if train.ndim < 1 or len(train) == 0:
        raise ValueError("train must hold at least one example: its statistics set the scale")
    mean = train.mean(axis=0, dtype=np.float64)
    std = train.std(axis=0, dtype=np.float64)
    # The mean of equal numbers need not be that number, which leaves a deviation that is no zero.
    constant = train.min(0) == train.max(0)
    constant |= std <= 8 * np.finfo(np.float64).eps * np.abs(mean)
    mean, scale = np.where(constant, train[0], mean), 1.0 / np.where(constant, 1.0, std)

    def apply(array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        if array.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"features differ: train has {list(train.shape[1:])} an example, "
                f"another array {list(array.shape[1:])}"
            )
        # Wide numbers are shifted as they are: in float32 a large mean would swallow what varies.
        out = array.astype(np.result_type(array.dtype, np.float32))
        out -= mean.astype(out.dtype)
        out *= scale.astype(out.dtype)
        return out.astype(np.float32, copy=False)

    return tuple(apply(array) for array in (train, *others))
