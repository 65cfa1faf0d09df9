"""What a mixture looks like to those who read it. Sources: docs/mixture_export.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bilevel_flax.train.errors import ConfigError
from bilevel_flax.train.mixture.learned import LearnedMixture, Stage


class Plan(NamedTuple):
    """How the reader will train.

    Attributes:
        sequences: of its run, in all.
        length: tokens of one; None: not known.
        stages: at most so many, >= 1.
        stage: for a reader of one mixture: that of this stage; None: the end point.
        block_size: sequences in a block of Levanter's.
        names: the reader's domains in its order.
        paths: domain -> where the reader finds it.
    """

    sequences: int
    length: int | None
    stages: int
    stage: int | None
    block_size: int
    names: list[str]
    paths: dict[str, str]


class Written(NamedTuple):
    """What goes into the file, and what there is to say about it."""

    content: Any
    notes: list[str]


def _curriculum(mixture: LearnedMixture, plan: Plan, multiple: int = 1) -> list[tuple[int, Stage]]:
    """(first sequence, stage), the sequences multiples of a number; short stages are joined."""
    wanted = (i * plan.sequences / plan.stages for i in range(plan.stages))
    starts = sorted({round(start / multiple) * multiple for start in wanted})
    starts = [start for start in starts if start < plan.sequences]
    stages = mixture.stages([start / plan.sequences for start in starts])
    return list(zip(starts, stages, strict=True))


def _ordered(shares: dict[str, float], plan: Plan) -> dict[str, float]:
    return {name: shares[name] for name in plan.names}


def _stages(mixture: LearnedMixture, plan: Plan) -> list[dict[str, Any]]:
    return [
        {"start_sequence": start}
        | ({} if plan.length is None else {"start_token": start * plan.length})
        | {"mixture": _ordered(stage.shares, plan)}
        for start, stage in _curriculum(mixture, plan)
    ]


def _one(mixture: LearnedMixture, plan: Plan) -> dict[str, float]:
    """The end point, or the mixture of the stage that was asked for."""
    if plan.stage is None:
        return _ordered(mixture.shares, plan)
    stages = _curriculum(mixture, plan)
    if plan.stage >= len(stages):
        raise ConfigError(
            f"--stage={plan.stage}: there are {len(stages)} stages, 0 to {len(stages) - 1}; "
            "--stages says how many"
        )
    return _ordered(stages[plan.stage][1].shares, plan)


def maxtext(mixture: LearnedMixture, plan: Plan) -> Written:
    """MaxText's Grain mixture: name -> path and weight, which Grain wants to be positive."""
    every = _one(mixture, plan)
    shares = {name: share for name, share in every.items() if share > 0}
    left_out = ", ".join(repr(name) for name in every if name not in shares)
    path = lambda name: plan.paths.get(name, name)
    content = {name: {"path": path(name), "weight": share} for name, share in shares.items()}
    missing = ", ".join(repr(name) for name in shares if name not in plan.paths)
    note = (
        f"the run does not say where {missing} lies: put the patterns of ArrayRecord files into "
        "`path`, or hand over a file that has them, --reader FILE"
    )
    notes = [f"{left_out} has weight 0 and is left out"] if left_out else []
    return Written(content, [*notes, note] if missing else notes)


def levanter(mixture: LearnedMixture, plan: Plan) -> Written:
    """Levanter's `data.train_weights`: stages that begin at multiples of the block size."""
    size = plan.block_size
    stages = [
        [start, _ordered(stage.shares, plan)] for start, stage in _curriculum(mixture, plan, size)
    ]
    few = {name for _, shares in stages for name, p in shares.items() if 0 < p * size < 1}
    note = (
        f"a block of {size} holds less than one sequence of {', '.join(map(repr, sorted(few)))} in "
        "some stage, and Levanter rounds that to none: take a larger --block-size"
    )
    content = {"data": {"train_weights": stages, "mixture_block_size": size}}
    return Written(content, [note] if few else [])


def datasets(mixture: LearnedMixture, plan: Plan) -> Written:
    """The order of the data sets and `interleave_datasets`' probabilities, with the stages'."""
    names = plan.names
    shares = _one(mixture, plan)
    stages = [
        {**stage, "probabilities": [stage["mixture"][name] for name in names]}
        for stage in _stages(mixture, plan)
    ]
    for stage in stages:
        del stage["mixture"]
    probabilities = [shares[name] for name in names]
    unread = [name for name in names if not shares[name]]
    note = (
        f"{', '.join(map(repr, unread))} has probability 0: hand over the others alone, for with "
        'stopping_strategy="all_exhausted" the stream would never end'
    )
    content = {"datasets": names, "probabilities": probabilities, "stages": stages}
    return Written(content, [note] if unread else [])


def as_json(mixture: LearnedMixture, plan: Plan) -> Written:
    """The end point and the curriculum by name."""
    content = {
        "mixture": _ordered(mixture.shares, plan),
        "stages": _stages(mixture, plan),
        "sequences": plan.sequences,
        "length": plan.length,
    }
    return Written(content, [])


READERS: dict[str, Callable[[LearnedMixture, Plan], Written]] = {
    "maxtext": maxtext,
    "levanter": levanter,
    "datasets": datasets,
    "json": as_json,
}
ONE_MIXTURE = ("maxtext", "datasets")  # of them, those that may be handed a stage's
