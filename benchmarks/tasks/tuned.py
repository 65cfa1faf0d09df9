r"""Pairs (ρ, ρ/γ) that grids of this bench found, by task and method: what runs without `--grid`.

Each method chose from the same number of pairs by the value at the end of a short run with seed 0
(hypercleaning: by the validation error). The commands, ALL being all methods:

    bilevel-flax bench quadratics --solvers ALL --grid 8 --seconds 0.5 --clock cpu --out DIR
    bilevel-flax bench breast_cancer --solvers ALL --grid 6 --seconds 0.25 --clock cpu --out DIR
    bilevel-flax bench ijcnn1 --solvers saba,srba,soba,amigo,spaba,masoba,storm,fsla --grid 6 \
        --seconds 0.4 --clock cpu --manual-dir DATA --out DIR
    bilevel-flax bench mnist_hypercleaning --solvers soba --grid 6 --seeds 3 --seconds 8 \
        --clock cpu --manual-dir DATA --out DIR        (_p70 with soba,saba; _p90)

Budgets are short, and a pair that leads early need not lead late: for a comparison that matters
run a grid of your own with its budget.
"""

from __future__ import annotations

from collections.abc import Mapping

TUNED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "quadratics": {
        "amigo": (0.03125, 1.0),
        "bsa": (0.03125, 1.0),
        "bsg": (0.125, 10.0),
        "bsgo": (0.125, 10.0),
        "f2sa": (0.125, 10.0),
        "fsla": (0.125, 10.0),
        "implicit": (0.125, 10.0),
        "masoba": (0.125, 10.0),
        "mrbo": (0.5, 0.1),
        "saba": (0.0625, 0.0316228),
        "soba": (0.03125, 1.0),
        "spaba": (0.125, 10.0),
        "srba": (0.03125, 1.0),
        "stocbio": (0.125, 10.0),
        "storm": (0.125, 10.0),
        "sustain": (0.5, 0.1),
        "ttsa": (0.125, 10.0),
        "unrolled": (0.125, 10.0),
        "vrbo": (0.125, 0.1),
    },
    "breast_cancer": {
        "amigo": (8.0, 1.0),
        "bsa": (2.0, 0.0316228),
        "bsg": (2.0, 0.0316228),
        "bsgo": (0.5, 0.1),
        "f2sa": (8.0, 1.0),
        "fsla": (8.0, 1.0),
        "grid_search": (0.125, 10.0),
        "implicit": (0.5, 0.1),
        "masoba": (8.0, 1.0),
        "mrbo": (8.0, 1.0),
        "random_search": (0.125, 10.0),
        "saba": (8.0, 1.0),
        "soba": (8.0, 1.0),
        "spaba": (8.0, 1.0),
        "srba": (8.0, 1.0),
        "stocbio": (2.0, 0.0316228),
        "storm": (8.0, 1.0),
        "sustain": (8.0, 1.0),
        "ttsa": (2.0, 0.0316228),
        "unrolled": (2.0, 0.0316228),
        "vrbo": (2.0, 0.0316228),
    },
    "ijcnn1": {
        "amigo": (8.0, 1.0),
        "fsla": (8.0, 1.0),
        "masoba": (8.0, 1.0),
        "saba": (8.0, 1.0),
        "soba": (8.0, 1.0),
        "spaba": (8.0, 1.0),
        "srba": (8.0, 1.0),
        "storm": (8.0, 1.0),
    },
    "mnist_hypercleaning": {
        "soba": (0.125, 0.1),
    },
    "mnist_hypercleaning_p70": {
        "saba": (8.0, 1.0),
        "soba": (0.5, 0.1),
    },
    "mnist_hypercleaning_p90": {
        "soba": (0.5, 0.1),
    },
}
