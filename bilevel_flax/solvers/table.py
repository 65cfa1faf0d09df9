"""The methods at a glance, for `bilevel-flax solvers`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One method.

    Attributes:
        name: as `qualified_name` finds it.
        units: gradient units of one step (gradient, HVP and cross-JVP count 1 each).
        memory: floats kept beside z, v, x and the optimisers.
        use: when to choose it.
    """

    name: str
    units: str
    memory: str
    use: str


# p and d: entries of z and x; N and M: inner and outer minibatches; T inner and S adjoint steps.
ROWS = (
    Row("auto", "1+3s/k", "as soba", "deep networks: nothing to tune; subsample=s, update_every=k"),
    Row("soba", "4", "-", "the start: any network, BatchNorm, augmentation, streams"),
    Row(
        "saba",
        "4",
        "(2N+M)p + (N+M)d",
        "finite data: goes on where SOBA stalls; docs/memory.md",
    ),
    Row("srba", "8 + passes", "3p + 2d", "as saba, where its tables do not fit"),
    Row("spaba", "8 + passes", "3p + 2d", "as srba, full passes at random steps"),
    Row("masoba", "4", "d", "noisy outer gradients"),
    Row("storm", "8", "4p + 2d", "variance reduction without a finite sum"),
    Row("fsla", "6", "2p + 2d", "comparison"),
    Row("amigo", "T+S+2", "-", "two loops, warm-started adjoint"),
    Row("stocbio", "T+S+2", "-", "two loops, Neumann series"),
    Row("bsa", "T+2+S/2", "-", "comparison: two loops, randomised Neumann series"),
    Row("ttsa", "3+S/2", "-", "comparison: two time scales"),
    Row("mrbo", "2(S+3)", "2p + 2d", "comparison: momentum on z and x"),
    Row("sustain", "5+S", "2p + 2d", "comparison: as mrbo, randomised Neumann series"),
    Row("vrbo", "2T(S+3) + passes", "2p + 2d", "comparison: full passes, inner loop on both"),
    Row("first_order", "3", "as soba", "as auto without second derivatives: opaque kernels"),
    Row("f2sa", "3T+3", "p", "comparison: the same with inner loops and a penalty that grows"),
    Row("bsg", "T+S+2", "-", "comparison: per-sample Hessian inverses; see its bias"),
    Row("bsgo", "T+S+2", "-", "comparison: as bsg, z from the full inner problem"),
    Row("implicit", "T+S+2", "-", "small problems: conjugate gradients or Neumann"),
    Row("unrolled", "3T+1", "T p", "few inner steps; backprop through them"),
    Row("darts1", "2", "-", "comparison: first-order DARTS, no adjoint; x must be in F"),
    Row("darts2", "4", "p", "comparison: second-order DARTS, one unrolled step"),
    Row("inner_only", "1", "-", "the baseline: plain training with x fixed"),
)

# Where each method is: `contrib` has those that the library is compared with.
_COMPARED = ("masoba", "fsla", "spaba", "bsa", "ttsa", "mrbo", "sustain", "vrbo", "bsg", "bsgo")
_HOMES = {
    **dict.fromkeys((*_COMPARED, "darts1", "darts2"), "bilevel_flax.contrib"),
    "inner_only": "bilevel_flax.solvers.inner_only",
}

COST = """\
cost: a gradient, a Hessian-vector product and a cross-JVP count 1 unit each; plain training is 1.
  auto: 4 units; 2.5 with subsample=.5 or update_every=2, 1.75 with subsample=.25 or update_every=4;
  the cheap setting for weights of examples, update_every=4 adjoint_update_every=2, is 1.46.
  `train` prints the cost of its config, summary.json has gradient_units_per_step (full passes
  included) and seconds_per_step (measured)."""


def qualified_name(name: str) -> str:
    """`package.module:NAME` of a method of the table, as configs name it.

    Example:
        >>> qualified_name("masoba")
        'bilevel_flax.contrib:masoba'
    """
    return f"{_HOMES.get(name, 'bilevel_flax')}:{name}"


def method(name: str) -> Any:
    """The function that makes the method's solver.

    Raises:
        AttributeError: there is no such method.
    """
    module, _, attribute = qualified_name(name).partition(":")
    return getattr(importlib.import_module(module), attribute)


def render() -> str:
    """The table as text."""
    rows = [Row("solver", "units a step", "extra memory", "use it for"), *ROWS]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + f"  {row.use}"
        for row in rows
    )
    return f"{table}\n\n{COST}"


def markdown() -> str:
    """The table in Markdown, as docs/choosing.md has it.

    Example:
        >>> print(markdown().splitlines()[3])
        | `bf.soba` | 4 | - | the start: any network, BatchNorm, augmentation, streams |
    """
    lines = ["| solver | units a step | extra memory | use it for |", "|---|---|---|---|"]
    for row in ROWS:
        home = _HOMES.get(row.name, "bilevel_flax").replace("bilevel_flax", "bf")
        lines.append(f"| `{home}.{row.name}` | {row.units} | {row.memory} | {row.use} |")
    return "\n".join(lines)
