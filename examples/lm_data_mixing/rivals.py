"""Other ways to a mixture, each with what it costs: steps of plain training, searches included.

* proportional: of every domain as much as there is of it.
* direct_mix_tuned: `direct_mix` with its share chosen on validation data, a whole run for each.
* doremi: weights of domains by their excess loss over a reference model, averaged over a proxy run,
  then a run on them. It knows of no target.
* online: a bandit on the domains, with the loss for its reward. It knows of none, either.
* regmix: short runs on random mixtures, a regression of their validation loss on the mixture, and
  a run on the mixture that it thinks best.

References:
    S. M. Xie, H. Pham, X. Dong, N. Du, H. Liu, Y. Lu, P. Liang, Q. V. Le, T. Ma, A. W. Yu. DoReMi:
    optimizing data mixtures speeds up language model pretraining. NeurIPS 2023.
    A. Albalak, L. Pan, C. Raffel, W. Y. Wang. Efficient online data mixing for language model
    pre-training. 2023.
    Q. Liu, X. Zheng, N. Muennighoff, G. Zeng, L. Dou, T. Pang, J. Jiang, M. Lin. RegMix: data
    mixture as regression for language model pre-training. ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NAMES = ("proportional", "direct_mix_tuned", "doremi", "online", "regmix")
# A pass forward is about a third of a step.
FORWARD = 1 / 3

_MEASURED = 8  # windows of a domain whose loss is looked at: about a minibatch
_SMOOTHING = 1e-3  # of DoReMi's weights towards equal ones
_DRAWS = 4096  # mixtures among which RegMix looks for the best
_MIXTURES = 31  # keeps RegMix's draws apart from a run's others

Windows = Callable[[int, int], np.ndarray]


class Kit(NamedTuple):
    """What a rival is made of.

    Attributes:
        steps: of a run.
        seed: of the run.
        train: `train(windows, steps) -> Plain`, which asks for windows chunk by chunk; while it
            runs, `params()` is its z.
        params: z of the run that is under way.
        by_shares: `by_shares(shares) -> Windows`, with `shares() -> [domains]` asked at each call.
        direct: `direct(share) -> Windows`, with that share of F's sample.
        nats: `nats(z, windows) -> float`.
        validation: held-out windows.
        looked_at: of each domain some windows.
        sizes: of each domain, in windows.
        pool: [domains], 1, and 0 for the target's sample where that is one of them: only who knows
            of the target may read it.
        options: the config's `rivals`.
    """

    steps: int
    seed: int
    train: Callable[..., Any]
    params: Callable[[], Any]
    by_shares: Callable[[Callable[[], np.ndarray]], Windows]
    direct: Callable[[float], Windows]
    nats: Callable[[Any, np.ndarray], float]
    validation: np.ndarray
    looked_at: list[np.ndarray]
    sizes: np.ndarray
    pool: np.ndarray
    options: Any


class RivalRun(NamedTuple):
    """A rival's run.

    Attributes:
        plain: the network.
        cost: plain steps that it took, all of its searches counted.
        mixture: [domains], where there is one.
        notes: what else a reader wants to know.
    """

    plain: Any
    cost: float
    mixture: Any = None
    notes: dict[str, Any] | None = None


def proportional(kit: Kit) -> RivalRun:
    """As much of every domain as there is of it."""
    shares = _normalized(kit.sizes * kit.pool)
    return RivalRun(kit.train(kit.by_shares(lambda: shares), kit.steps), kit.steps, shares)


def direct_mix_tuned(kit: Kit) -> RivalRun:
    """The best of several shares of the sample, by the validation text."""
    runs = {share: kit.train(kit.direct(share), kit.steps) for share in kit.options.direct_shares}
    nats = {share: kit.nats(run.params, kit.validation) for share, run in runs.items()}
    best = min(nats, key=lambda share: nats[share])
    return RivalRun(runs[best], len(runs) * kit.steps, None, {"share": best})


def _normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _losses(kit: Kit, z: Any) -> np.ndarray:
    return np.array([kit.nats(z, windows[:_MEASURED]) for windows in kit.looked_at])


def doremi(kit: Kit) -> RivalRun:
    """A run on the average of the weights that a proxy met while it fought its worst domain."""
    count, equal = len(kit.sizes), _normalized(kit.pool)
    reference = _losses(kit, kit.train(kit.by_shares(lambda: equal), kit.steps).params)
    seen = []

    def shares():
        excess = np.maximum(_losses(kit, kit.params()) - reference, 0)
        last = seen[-1] if seen else equal
        weights = _normalized(last * np.exp(kit.options.doremi_rate * excess))
        seen.append((1 - _SMOOTHING) * weights + _SMOOTHING * equal)
        return seen[-1]

    kit.train(kit.by_shares(shares), kit.steps)
    mixture = np.mean(seen, axis=0)
    run = kit.train(kit.by_shares(lambda: mixture), kit.steps)
    return RivalRun(run, 3 * kit.steps + FORWARD * count * (len(seen) + 1), mixture)


def online(kit: Kit) -> RivalRun:
    """Exponential weights on the domains' losses, with exploration that fades."""
    count, rewards, seen = int(kit.pool.sum()), np.zeros(len(kit.sizes)), []

    def shares():
        turn = len(seen) + 1
        explore = min(1 / count, np.sqrt(np.log(count) / (count * turn)))
        powers = _normalized(kit.pool * np.exp(explore * (rewards - rewards.max())))
        policy = (1 - count * explore) * powers + explore * kit.pool
        # Every domain is looked at, so that no draw has to be weighted by its chance.
        rewards[:] = 0.9 * rewards + 0.1 * _losses(kit, kit.params())
        seen.append(policy)
        return policy

    run = kit.train(kit.by_shares(shares), kit.steps)
    return RivalRun(run, kit.steps + FORWARD * count * len(seen), np.mean(seen, axis=0))


def regmix(kit: Kit) -> RivalRun:
    """The mixture that a linear regression on short runs expects most of."""
    rng = np.random.default_rng((kit.seed, _MIXTURES))
    count, runs = len(kit.sizes), kit.options.regmix_runs
    short = max(1, round(kit.options.regmix_share * kit.steps))
    mixtures = rng.dirichlet(np.ones(count), runs)
    nats = []
    for mixture in mixtures:
        run = kit.train(kit.by_shares(lambda mixture=mixture: mixture), short)
        nats.append(kit.nats(run.params, kit.validation))
    # The shares sum to 1, so that their coefficients hold the constant, too.
    ridge = 1e-3 * np.eye(count)
    slopes = np.linalg.solve(mixtures.T @ mixtures + ridge, mixtures.T @ np.array(nats))
    drawn = rng.dirichlet(np.ones(count), _DRAWS)
    best = drawn[np.argsort(drawn @ slopes)[: _DRAWS // 40]].mean(0)
    run = kit.train(kit.by_shares(lambda: best), kit.steps)
    return RivalRun(run, runs * short + kit.steps, best, {"runs": runs, "steps_each": short})


RIVALS: dict[str, Callable[[Kit], RivalRun]] = {
    "proportional": proportional,
    "direct_mix_tuned": direct_mix_tuned,
    "doremi": doremi,
    "online": online,
    "regmix": regmix,
}
