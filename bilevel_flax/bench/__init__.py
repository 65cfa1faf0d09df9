"""`bilevel-flax bench`: every method on one task, with one budget and one protocol."""

from bilevel_flax.bench.options import CHOICES, Options
from bilevel_flax.bench.protocol import run

__all__ = ["CHOICES", "Options", "run"]
