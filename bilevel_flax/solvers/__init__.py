"""The methods, one a file."""

from bilevel_flax.solvers.fsla import fsla
from bilevel_flax.solvers.masoba import masoba
from bilevel_flax.solvers.saba import saba
from bilevel_flax.solvers.soba import soba
from bilevel_flax.solvers.spaba import spaba
from bilevel_flax.solvers.srba import srba
from bilevel_flax.solvers.storm import storm

__all__ = ["fsla", "masoba", "saba", "soba", "spaba", "srba", "storm"]
