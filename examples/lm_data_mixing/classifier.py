"""Selection by a classifier: which windows look most like the target's sample?

Logistic regression on which pairs of bytes a window holds, the sample against as it comes from the
domains. The score of a window is a sum over its pairs, so that scoring is a look-up.

References:
    R. Aharoni, Y. Goldberg. Unsupervised domain clusters in pretrained language models. ACL 2020.
    T. Brown et al. Language models are few-shot learners. NeurIPS 2020, appendix A.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression

_PAIRS = 256 * 256


def _pairs(tokens: np.ndarray) -> np.ndarray:
    """[n, length + 1] bytes -> [n, length], one number for each pair of neighbours."""
    wide = tokens.astype(np.int64) % 256  # of another tokeniser's: hashed
    return wide[..., :-1] * 256 + wide[..., 1:]


def fit(sample: np.ndarray, pool: np.ndarray, strength: float = 10.0) -> np.ndarray:
    """The weight of every pair of bytes, float64 [65536].

    Args:
        sample: windows of the target, [n, length + 1].
        pool: windows of the domains, [m, length + 1].
        strength: C of the regression, the inverse of its penalty.
    """
    pairs = _pairs(np.concatenate([sample, pool]))
    rows = np.repeat(np.arange(len(pairs)), pairs.shape[1])
    counts = np.full(pairs.size, 1 / pairs.shape[1])
    table = scipy.sparse.csr_matrix((counts, (rows, pairs.ravel())), (len(pairs), _PAIRS))
    label = np.arange(len(pairs)) < len(sample)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=200)
    return model.fit(table, label).coef_[0]


def score(weights: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How much windows [..., length + 1] look like the target, [...]."""
    return weights[_pairs(tokens)].mean(-1)
