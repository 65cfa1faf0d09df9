"""Where the measurements of `health.py` are healthy, and what to try where they are not.

Warnings follow from the lines of `metrics.jsonl` alone: a resumed run gives those that an
uninterrupted one gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

PREFIX = "warning/"  # of their names in metrics.jsonl and TensorBoard
_ENOUGH = 2  # probes out of range, one after the other; one alone may be noise

Values = Mapping[str, Any]


class Range(NamedTuple):
    """A measurement, when it is out of range, and the words for it.

    Attributes:
        name: of the warning.
        needs: names of the values that it looks at.
        ill: `ill(values) -> bool`.
        words: a template for the values.
        probes: out of range one after the other, before it is said.
    """

    name: str
    needs: tuple[str, ...]
    ill: Callable[[Values], bool]
    words: str
    probes: int = _ENOUGH


RANGES = (
    Range(
        "adjoint_residual",
        ("adjoint_residual",),
        lambda v: v["adjoint_residual"] > 1.5,
        "v solves its system worse than v = 0 would (adjoint residual {adjoint_residual:.2g}, that "
        "of 0 is 1, healthy below 1.5). Likely the step of v, which is as z's unless set apart, is "
        "too long: lower the inner learning rate, or damp v (damping=)",
    ),
    Range(
        "negative_curvature",
        ("health/negative_curvature",),
        lambda v: v["health/negative_curvature"] > 0.5,
        "the inner loss curves downwards along v on {health/negative_curvature:.0%} of the held "
        "minibatches (healthy below 50%): z is not near a minimum. Lower the outer learning rate, "
        "keep x frozen for longer at the start, or add weight decay to the inner loss or damping=",
    ),
    Range(
        "inner_step",
        ("health/step_inner",),
        lambda v: v["health/step_inner"] > 0.1,
        "z moves by {health/step_inner:.0%} of its length in a step (healthy below 10%): lower the "
        "inner learning rate",
    ),
    Range(
        "outer_still",
        ("health/step_outer",),
        lambda v: v["health/step_outer"] == 0.0,
        "x stands still: nothing is learned about it. Is the outer learning rate 0, does the "
        "schedule of x end too early, or does outer_params not reach the inner loss?",
    ),
    Range(
        "outer_size",
        ("health/outer_size",),
        lambda v: v["health/outer_size"] > 20.0,
        "the entries of x are {health/outer_size:.3g} times what they were at the start (healthy "
        "below 20): x has run away, and weights made of it are all or nothing. Lower the outer "
        "learning rate",
        probes=1,
    ),
    Range(
        "hypergradient_cosine",
        ("hypergradient_cosine", "health/reference_residual"),
        # Against a reference that is itself far from solved, a low cosine says nothing.
        lambda v: v["hypergradient_cosine"] < 0.3 and v["health/reference_residual"] < 0.5,
        "D_x points elsewhere than the hypergradient (cosine {hypergradient_cosine:.2g}, healthy "
        "above 0.3). v lags behind: lower the outer learning rate, or train v longer with x frozen",
        probes=1,
    ),
    Range(
        "memorisation",
        ("health/loss_seen", "health/loss_held_out", "health/loss_gap_error"),
        lambda v: (
            v["health/loss_held_out"] - 2 * v["health/loss_gap_error"] > 1.5 * v["health/loss_seen"]
        ),
        "x fits the outer data that it learns from: their loss is {health/loss_seen:.3g}, that of "
        "held-out ones {health/loss_held_out:.3g} (healthy below 1.5 times). Stop earlier, lower "
        "the outer learning rate, or give F more data",
    ),
)


def warnings(rows: Sequence[Values]) -> dict[str, str]:
    """What the newest line gives reason to say.

    The same is said again only when twice as many steps have passed, so a run has few warnings.

    Args:
        rows: lines of `metrics.jsonl`, the newest last: values and earlier warnings.

    Returns:
        Texts by name, without `PREFIX`.
    """
    step, found = rows[-1]["step"], {}
    for one in RANGES:
        measured = [row for row in rows if all(name in row for name in one.needs)]
        if len(measured) < one.probes or measured[-1] is not rows[-1]:
            continue
        said = [row["step"] for row in rows if PREFIX + one.name in row]
        if said and step < 2 * said[-1]:
            continue
        newest = [{name: float(row[name]) for name in one.needs} for row in measured]
        if all(one.ill(values) for values in newest[-one.probes :]):
            found[one.name] = one.words.format_map(newest[-1])
    return found
