"""The methods, one a file."""

from bilevel_flax.solvers.amigo import amigo
from bilevel_flax.solvers.bsa import bsa
from bilevel_flax.solvers.bsg import bsg, bsgo
from bilevel_flax.solvers.darts import darts1, darts2
from bilevel_flax.solvers.f2sa import f2sa
from bilevel_flax.solvers.fsla import fsla
from bilevel_flax.solvers.implicit import implicit
from bilevel_flax.solvers.inner_only import inner_only
from bilevel_flax.solvers.masoba import masoba
from bilevel_flax.solvers.mrbo import mrbo
from bilevel_flax.solvers.saba import saba
from bilevel_flax.solvers.search import grid_search, random_search
from bilevel_flax.solvers.soba import soba
from bilevel_flax.solvers.spaba import spaba
from bilevel_flax.solvers.srba import srba
from bilevel_flax.solvers.stocbio import stocbio
from bilevel_flax.solvers.storm import storm
from bilevel_flax.solvers.sustain import sustain
from bilevel_flax.solvers.ttsa import ttsa
from bilevel_flax.solvers.unrolled import unrolled
from bilevel_flax.solvers.vrbo import vrbo

__all__ = [
    "amigo",
    "bsa",
    "bsg",
    "bsgo",
    "darts1",
    "darts2",
    "f2sa",
    "fsla",
    "grid_search",
    "implicit",
    "inner_only",
    "masoba",
    "mrbo",
    "random_search",
    "saba",
    "soba",
    "spaba",
    "srba",
    "stocbio",
    "storm",
    "sustain",
    "ttsa",
    "unrolled",
    "vrbo",
]
