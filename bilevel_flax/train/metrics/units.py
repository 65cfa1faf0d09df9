"""What a metric is measured in: its task declares it, nothing is read from its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

FRACTION, COUNT, SECONDS = "fraction", "count", "seconds"

# The values that every run has, beside its task's.
_OF_EVERY_RUN = {
    "steps": COUNT,
    "selected_step": COUNT,
    "oracle_units": COUNT,
    "seconds": SECONDS,
    "cpu_seconds": SECONDS,
    "compile_seconds": SECONDS,
    "seconds_per_step": SECONDS,
    "health/negative_curvature": FRACTION,
}


def unit_of(name: str, units: Mapping[str, str]) -> str:
    """The unit declared for a name, or for the family that it belongs to; "" where there is none.

    Args:
        name: of a metric; a slash or a dot parts a family's name from a member's.
        units: by name, as `Task.units`.

    >>> units = {"test_error": "fraction", "nats": "nats"}
    >>> unit_of("test_error.soba", units), unit_of("nats/code", units), unit_of("error", units)
    ('fraction', 'nats', '')
    """
    declared = {**_OF_EVERY_RUN, **units}
    while name:
        if name in declared:
            return declared[name]
        family = re.match(r"(.*)[/.]", name, re.DOTALL)
        name = family[1] if family else ""
    return ""


def format_value(value: Any, unit: str = "") -> str:
    """A value as a reader wants it, with four digits.

    Args:
        value: a number, text, None, or what JSON holds.
        unit: "fraction" is shown in percent, "count" without digits after the point, "seconds"
            as µs, ms or s; any other text stands behind the number.

    >>> format_value(0.1501, "fraction"), format_value(0.3), format_value(1.25, "nats")
    ('15.01 %', '0.3', '1.25 nats')
    >>> format_value(20000, "count"), format_value(0.00083, "seconds")
    ('20,000', '830 µs')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    if not math.isfinite(value):
        return str(value)
    if unit == FRACTION:
        return f"{100 * value:.2f} %"
    if unit == COUNT:
        return f"{value:,.0f}"
    if unit == SECONDS:
        size = abs(value)
        return (
            f"{value:,.0f} s"
            if size >= 100
            else f"{value:.1f} s"
            if size >= 1 or not size
            else f"{1e3 * value:.3g} ms"
            if size >= 1e-3
            else f"{1e6 * value:.3g} µs"
        )
    if isinstance(value, int):
        text = str(value)
    elif value.is_integer() and 1e4 <= abs(value) < 1e12:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".rstrip()
