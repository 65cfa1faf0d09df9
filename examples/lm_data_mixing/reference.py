"""The mixture that is known to be good before a step is made: from the domains' pairs of bytes.

Each domain is a bigram model, and so is one half of the target's sample. The mixture of them that
makes the other half most likely (EM on its shares, each half in turn) says how much of the target
each domain holds. Text of the target among the domains takes all of the weight; where there is
none, it goes to the sample itself, of which there is little, and which is to be taken only where it
is worth its being read again and again (a byte of it must be 1.1 times as likely). In the place of
the sample the run first reads what looks like it in any domain (`curriculum.py`), and then the
sample itself more and more: its part a rises along a line from 0 to 1, or, where that would read
the sample too often, to less, down to one half, and then from later on. A domain that would be read
more often than that leaves what it cannot give to the target as well.

References:
    A. P. Dempster, N. M. Laird, D. B. Rubin. Maximum likelihood from incomplete data via the EM
    algorithm. JRSS B 1977.
    S. M. Xie, S. Santurkar, T. Ma, P. Liang. Data selection for language models via importance
    resampling. NeurIPS 2023 (n-gram models of the target and of the pool).
    N. Muennighoff et al. Scaling data-constrained language models. NeurIPS 2023 (how often text
    may be repeated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BYTES = 256
_PRIOR = 10.0  # pairs that a byte is taken to have been seen with, from the bytes alone
_REPEATED = 0.1  # nats per byte by which the sample must be better than the domains
_ROUNDS = 100
_STAGES = 101
_LOWEST_END = 0.5


class Reference(NamedTuple):
    """What the pairs of bytes say.

    Attributes:
        shares: of the domains, and last of the sample; they sum to 1.
        ratio: log of how much likelier a pair of bytes is in the sample than in the pool, [65536].
        spent: of the domains, whether the run reads as much of it as it may.
    """

    shares: np.ndarray
    ratio: np.ndarray
    spent: np.ndarray


def fit(
    domains: Sequence[np.ndarray], halves: Sequence[np.ndarray], most: np.ndarray | float = 1.0
) -> Reference:
    """The shares with which the domains explain the sample.

    Args:
        domains: of each some windows, [n, length + 1].
        halves: the sample's windows in two parts that share nothing.
        most: of all windows of the run, the most that may come from each domain.
    """
    models = [_bigrams(windows) for windows in domains]
    both = []
    for here, other in (halves, halves[::-1]):
        both.append(_shares([*models, np.exp(-_REPEATED) * _bigrams(other)], here))
    target, pool = (_bigrams(np.concatenate(windows)) for windows in (halves, domains))
    shares = np.mean(both, axis=0)
    spent = shares[:-1] > most
    shares[:-1] = np.minimum(shares[:-1], most)
    shares[-1] = 1 - shares[:-1].sum()
    return Reference(shares, np.log(target / pool).ravel(), spent)


def rise(reference: Reference, share: float) -> np.ndarray:
    """What a is at evenly spaced points of the run, [stages].

    Args:
        reference: what the pairs of bytes say.
        share: of all windows of the run, the most that may be read in the sample, > 0.
    """
    mean = min(0.5, share / max(reference.shares[-1], 1e-9))
    end = max(_LOWEST_END, 2 * mean)
    return np.clip(end - end**2 / (2 * mean) * (1 - np.linspace(0, 1, _STAGES)), 0, end)


def _pairs(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = windows.astype(np.int64) % _BYTES  # of another tokeniser's: hashed
    return tokens[:, :-1].ravel(), tokens[:, 1:].ravel()


def _bigrams(windows: np.ndarray) -> np.ndarray:
    """P(next | byte), [256, 256], smoothed with the bytes' own frequencies."""
    counts = np.zeros((_BYTES, _BYTES))
    np.add.at(counts, _pairs(windows), 1.0)
    alone = counts.sum(0) + 0.5
    smoothed = counts + _PRIOR * alone / alone.sum()
    return smoothed / smoothed.sum(1, keepdims=True)


def _shares(models: Sequence[np.ndarray], windows: np.ndarray) -> np.ndarray:
    """EM: the shares of the models in the mixture, window by window, that is most likely."""
    pairs = _pairs(windows)
    logs = np.stack([np.log(model)[pairs].reshape(len(windows), -1).sum(1) for model in models])
    likelihoods = np.exp(logs - logs.max(0))
    shares = np.full(len(models), 1 / len(models))
    for _ in range(_ROUNDS):
        joint = shares[:, None] * likelihoods
        shares = (joint / joint.sum(0)).mean(1)
    return shares
