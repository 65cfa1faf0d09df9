"""The table of Optax's optimisers in docs/optimisers.md is what the library says of each."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import optax
import optax.contrib  # noqa: F401  a part of its own
from inner_optimiser_test import LEFT_OUT, families

from bilevel_flax.solvers.optimiser_probes import applies_to_adjoint, is_linear

PAGE = Path(__file__).parents[2] / "docs" / "optimisers.md"
PARAMS = {"w": jnp.ones((2, 2))}
# Aliases whose learning rate may be left out, or that have none.
BY_DEFAULT = (
    "adadelta",
    "adafactor",
    "lbfgs",
    "polyak_sgd",
    "contrib.cocob",
    "contrib.dadapt_adamw",
    "contrib.dog",
    "contrib.dowg",
    "contrib.momo",
    "contrib.momo_adam",
    "contrib.prodigy",
    "contrib.schedule_free_adamw",
    "contrib.schedule_free_sgd",
)
HEAD = ("optimiser of z", "as z's optimiser", "v under `bf.auto`", "remark")


def row(name: str) -> tuple[str, str, str, str]:
    """What is found by asking the optimiser itself."""
    module, _, short = name.rpartition(".")
    remark = LEFT_OUT.get(name, "")
    if name == "contrib.sophia":
        return name, "needs more than a rate", "", remark
    make = getattr(optax.contrib if module else optax, short)
    inner = make() if name in BY_DEFAULT else make(0.05)
    try:
        decay_inside = applies_to_adjoint(inner, inner.init(PARAMS), PARAMS)
    except ValueError as error:
        return name, "refused", "pass `adjoint=`", str(error).split(" (")[0].removeprefix("inner ")
    v = "as z" if is_linear(inner, PARAMS) else "in units of its own"
    return name, "works", v + ("" if decay_inside else ", without decay"), remark


def table() -> str:
    lines = [HEAD, ("---",) * len(HEAD), *map(row, sorted({*families(), *BY_DEFAULT}))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def test_the_table_of_optimisers_is_current():
    assert table() in PAGE.read_text(encoding="utf-8"), "run: python tests/solvers/zoo_test.py"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("| " + HEAD[0])] + table() + "\n", encoding="utf-8")
