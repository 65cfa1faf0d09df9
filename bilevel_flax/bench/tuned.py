"""Pairs (ρ, ρ/γ) that grids of this bench found, by task and method: what runs without `--grid`.

Each method chose from the same number of pairs by the value at the end of a short run with seed 0
(hypercleaning: by the validation error). The commands, ALL being all methods:

    bilevel-flax bench quadratics --solvers ALL --grid 8 --seconds 0.5 --clock cpu
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
}
