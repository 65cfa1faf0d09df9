"""The methods, one a file; `contrib` has those that they are compared with."""

from bilevel_flax.solvers.auto import auto
from bilevel_flax.solvers.first_order import first_order
from bilevel_flax.solvers.nested import amigo, f2sa, implicit, stocbio, unrolled
from bilevel_flax.solvers.on_rows import on_rows
from bilevel_flax.solvers.saba import saba
from bilevel_flax.solvers.single_loop import single_loop
from bilevel_flax.solvers.soba import soba
from bilevel_flax.solvers.srba import srba
from bilevel_flax.solvers.storm import storm

__all__ = [
    "amigo",
    "auto",
    "f2sa",
    "first_order",
    "implicit",
    "on_rows",
    "saba",
    "single_loop",
    "soba",
    "srba",
    "stocbio",
    "storm",
    "unrolled",
]
