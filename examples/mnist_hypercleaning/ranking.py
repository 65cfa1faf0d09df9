"""How well do the learned weights rank wrong labels before correct ones: the ROC curve.

In NumPy, for importing scikit-learn takes as long as importing everything else.
"""

from __future__ import annotations

import numpy as np


def roc_curve(weights: np.ndarray, is_wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Calls examples suspicious from the lowest weight upwards, equal weights together.

    Args:
        weights: float [n].
        is_wrong: bool [n], with both kinds in it.

    Returns:
        Two float64 arrays from 0 to 1: the share of the correct labels that are called suspicious
        so far, and the share of the wrong ones.
    """
    order = np.argsort(weights, kind="stable")
    wrong = np.asarray(is_wrong, bool)[order]
    # Only where the weight changes: within a tie no order can be told.
    ends = np.append(np.flatnonzero(np.diff(weights[order])), len(order) - 1)
    hits = np.concatenate([[0], np.cumsum(wrong)[ends]])
    false_alarms = np.concatenate([[0], np.cumsum(~wrong)[ends]])
    return false_alarms / false_alarms[-1], hits / hits[-1]


def wrong_label_auc(weights: np.ndarray, is_wrong: np.ndarray) -> float:
    """Area under the curve: the chance that a wrong label weighs less than a correct one.

    Args:
        weights: float [n].
        is_wrong: bool [n].

    Returns:
        In [0, 1]; NaN unless there are both kinds.
    """
    if is_wrong.all() or not is_wrong.any():
        return float("nan")
    false_alarms, hits = roc_curve(weights, is_wrong)
    return float(np.trapezoid(hits, false_alarms))
