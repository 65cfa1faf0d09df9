"""The policies that a learned one is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel_flax.outer.augmentation import Policy

RANDAUGMENT_CHOICES = 2  # operations an image gets on average, as RandAugment's N


def fractions(policy: Policy, outer_params: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By operation: magnitude as a fraction of its limit, and probability."""
    settings = policy.learned(outer_params)
    return {
        each.name: (
            np.asarray(settings[each.name]["magnitude"]) / (limit if each.graded else 1.0),
            np.asarray(settings[each.name]["probability"]),
        )
        for each, limit in zip(policy.operations, policy.limits, strict=True)
    }


def shuffled(policy: Policy, outer_params: Any, *, seed: int) -> Any:
    """The x whose operations have each other's strengths: the same strengths, dealt out at random.

    An operation gets another one's (magnitude as a fraction of its limit, probability). One that is
    not graded has a probability only: it takes the product of the two, and gives its square root
    twice, so that the products of all operations are those of the learned policy.
    """
    pairs = []
    for each, pair in zip(policy.operations, fractions(policy, outer_params).values(), strict=True):
        share, chance = pair
        pairs.append((share, chance) if each.graded else (np.sqrt(chance), np.sqrt(chance)))
    order = np.random.default_rng(seed).permutation(len(pairs))
    values = {}
    for number, each, limit in zip(order, policy.operations, policy.limits, strict=True):
        share, chance = pairs[number]
        if each.graded:
            values[each.name] = {"magnitude": share * limit, "probability": chance}
        else:
            values[each.name] = {"probability": share * chance}
    return policy.at(values)


def uniform(policy: Policy, share: float) -> Any:
    """The x of RandAugment: all operations as often, with one magnitude for all.

    Args:
        policy: whose operations.
        share: of each operation's limit.

    References:
        E. D. Cubuk, B. Zoph, J. Shlens, Q. V. Le. RandAugment: practical automated data
        augmentation with a reduced search space. NeurIPS 2020.
    """
    chance = min(1.0, RANDAUGMENT_CHOICES / len(policy.operations))
    return policy.at(
        {
            each.name: {"probability": chance}
            | ({"magnitude": share * limit} if each.graded else {})
            for each, limit in zip(policy.operations, policy.limits, strict=True)
        }
    )
