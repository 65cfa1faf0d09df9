"""What the first network says of the later ones, and of the given labels: when to leave them alone.

The later networks were taught their own word, so they are surer than they are right. Where classes
can be told apart that does no harm: they are mostly right, and get better. Where they cannot, or
few labels are wrong, the given labels are better evidence than any network's word, and to replace
them, or to train on those alone that a network is sure of, makes things worse. Which it is says the
first network at labels that it has not seen, with the confusion matrix under which these are
likeliest (`noise_model.likeliest`). It may be less sure, or surer, than it is right: a network that
is hardly trained takes its doubt for evidence that the labels are right. So it has to say so at the
temperature under which the held-out labels are likeliest, too.
"""

from __future__ import annotations

import numpy as np

from bilevel_flax.recipes import noise_model

_SURE = 2.0  # standard errors
# A later network is expected to be right less often than this: as the first one is, and at the
# likeliest temperature, at which it is too sure where classes overlap.
_MOSTLY_WRONG, _MOSTLY_WRONG_TEMPERED = 0.5, 0.7
# A later network that doubts more labels than this may be right where the first one is not: noise
# of the image's own making, where there is much of it, fools the first.
_AGREED = 0.65
_TEMPERATURES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)


class FirstWord:
    """The first network's, at each training example.

    Args:
        probabilities: float [n, K], the first network's.
        given: int [n], the labels.
        held: int [h], those that it was not trained on; none: the later networks are trusted.
    """

    def __init__(self, probabilities: np.ndarray, given: np.ndarray, held: np.ndarray):
        self._probabilities, self._given, self._held = probabilities, given, held
        self._rows = np.arange(len(given))
        if len(held):
            self._matrix = noise_model.likeliest(probabilities[held], given[held])
            self._right = self.posterior()
            self._right_tempered = _tempered(probabilities, given, held)

    def posterior(self, *others: np.ndarray) -> np.ndarray:
        """Float [n, K], of the true labels: by this network, in the mean with others ([n, K])."""
        said = mean(self._probabilities, *others)
        return noise_model.posterior(said, self._given, self._matrix, 0.0)

    def prefers_given(self, said: np.ndarray, posterior: np.ndarray) -> bool:
        """Whether labels are better left as they are than taken from a later network.

        That is, whether it expects the network to be wrong about most of the examples, or, where
        that one doubts a third of the labels at most, more of those that it has not seen to be
        right as they are than as suggested.

        Args:
            said: float [n, K], the later network's probabilities.
            posterior: float [n, K], with the given labels, whose largest entries are suggested.
        """
        if not len(self._held):
            return False
        limits = (self._right, _MOSTLY_WRONG), (self._right_tempered, _MOSTLY_WRONG_TEMPERED)
        if all(right[self._rows, said.argmax(1)].mean() < limit for right, limit in limits):
            return True
        if (said.argmax(1) == self._given).mean() < _AGREED:
            return False
        rows, given, suggested = (
            self._held,
            self._given[self._held],
            posterior[self._held].argmax(1),
        )
        lost = [
            right[rows, given] - right[rows, suggested]
            for right in (self._right, self._right_tempered)
        ]
        return all(one.mean() > _SURE * one.std() / np.sqrt(len(rows)) for one in lost)


def _tempered(probabilities: np.ndarray, given: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The posterior at the temperature under which the held-out labels are likeliest."""
    found = []
    for temperature in _TEMPERATURES:
        powers = (probabilities + 1e-6) ** (1 / temperature)
        tempered = powers / powers.sum(1, keepdims=True)
        matrix = noise_model.likeliest(tempered[held], given[held])
        likelihoods = (tempered[held] * matrix[:, given[held]].T).sum(1)
        found.append((np.log(likelihoods + 1e-9).mean(), tempered, matrix))
    _, tempered, matrix = max(found, key=lambda one: one[0])
    return noise_model.posterior(tempered, given, matrix, 0.0)


def mean(*networks: np.ndarray) -> np.ndarray:
    """The geometric mean of probabilities [n, K], whose rows sum to 1 again."""
    of_all = np.exp(np.mean([np.log(one + 1e-6) for one in networks], axis=0))
    return of_all / of_all.sum(1, keepdims=True)
