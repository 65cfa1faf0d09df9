"""How given labels come from true ones: a confusion matrix, and the doubt of the image itself.

With true label t, given label y and an example s,

    P(y | t, s) = T_ty                              class-conditional: the example plays no part
    P(y | t, s) = T_tt                              y = t
                = (1 - T_tt) r_y / Σ_{k≠t} r_k      y ≠ t, r_k = T_tk p_k(s)^γ

where p(s) are a network's probabilities: with γ > 0 the wrong label is likely to be what the
example itself resembles. A matrix alone would take the given label for better evidence than it is.

References:
    G. Patrini, A. Rozza, A. Menon, R. Nock, L. Qu. Making deep neural networks robust to label
    noise: a loss correction approach. CVPR 2017 (the forward correction).
    A. Dempster, N. Laird, D. Rubin. Maximum likelihood from incomplete data via the EM algorithm.
    JRSS B 1977; A. J. Bekker, J. Goldberger. Training deep neural-networks based on unreliable
    labels. ICASSP 2016 (the matrix learned so).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

_FLOOR = 1e-4  # of a probability
_GRID = np.linspace(0.0, 2.0, 21)
_PRIOR = 5.0  # examples of each class that the first matrix counts for
_EM_STEPS = 15


def mostly_right(num_classes: int) -> np.ndarray:
    """The matrix before anything is known, float32 [K, K]: half right, half any label."""
    return (0.5 * np.eye(num_classes) + 0.5 / num_classes).astype(np.float32)


def normalized(counts: Any) -> jax.Array:
    """Rows that sum to 1, none of their entries 0."""
    counts = counts + 1e-3
    return counts / counts.sum(axis=1, keepdims=True)


def confusion(probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The matrix [K, K] of given labels by the label that a network holds for true.

    Args:
        probabilities: float [n, K], the network's.
        given: int [n].
    """
    num_classes = probabilities.shape[1]
    counts = np.full((num_classes, num_classes), 0.1)
    np.add.at(counts, (probabilities.argmax(1), given), 1.0)
    return counts / counts.sum(1, keepdims=True)


def likeliest(probabilities: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The matrix [K, K] under which given labels are likeliest, by expectation maximisation.

    Unlike `confusion` it does not take the network's doubt, or its mistakes, for the labels'.

    Args:
        probabilities: float [n, K], of a network that did not train on these labels.
        given: int [n].
    """
    num_classes = probabilities.shape[1]
    prior = _PRIOR * mostly_right(num_classes).astype(np.float64)
    matrix, shown = prior / _PRIOR, np.eye(num_classes)[given]
    for _ in range(_EM_STEPS):
        counts = prior + posterior(probabilities, given, matrix, 0.0).T @ shown
        matrix = counts / counts.sum(1, keepdims=True)
    return matrix


def resemblance(probabilities: np.ndarray, given: np.ndarray, matrix: np.ndarray) -> float:
    """γ in [0, 2] by maximum likelihood, from examples whose given label is surely wrong.

    Args:
        probabilities: float [n, K], of a network that did not train on these labels.
        given: int [n], none of them the network's own.
        matrix: float [K, K].

    Returns:
        0 where there are no examples.
    """
    if not len(given):
        return 0.0
    at, held = np.arange(len(given)), probabilities.argmax(1)
    scores = np.log(matrix[held])[None] + _GRID[:, None, None] * np.log(probabilities + _FLOOR)
    scores[:, at, held] = -np.inf
    likelihood = scores[:, at, given] - np.logaddexp.reduce(scores, axis=-1)
    return float(_GRID[likelihood.mean(1).argmax()])


def posterior(
    probabilities: np.ndarray, given: np.ndarray, matrix: np.ndarray, gamma: float
) -> np.ndarray:
    """P(true label | example, given label), float [n, K].

    Args:
        probabilities: float [n, K], the network's.
        given: int [n].
        matrix: float [K, K], T.
        gamma: γ.
    """
    p, at = np.asarray(probabilities, np.float64), np.arange(len(given))
    pull = (p + _FLOOR) ** gamma
    # Row t of `wrong`: how the mass 1 - T_tt is shared among the other labels, but for its sum.
    wrong = matrix * (1 - np.eye(len(matrix)))
    total = pull @ wrong.T
    likelihood = (1 - np.diag(matrix)) * wrong[:, given].T * pull[at, given][:, None] / total
    likelihood[at, given] = np.diag(matrix)[given]
    joint = p * likelihood
    return joint / joint.sum(1, keepdims=True)
