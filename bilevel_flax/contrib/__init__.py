"""Methods to compare with, one a file: the baselines of the papers and of the bench."""

from bilevel_flax.contrib.bsa import bsa
from bilevel_flax.contrib.bsg import bsg, bsgo
from bilevel_flax.contrib.darts import darts1, darts2
from bilevel_flax.contrib.fsla import fsla
from bilevel_flax.contrib.masoba import masoba
from bilevel_flax.contrib.mrbo import mrbo
from bilevel_flax.contrib.spaba import spaba
from bilevel_flax.contrib.sustain import sustain
from bilevel_flax.contrib.ttsa import ttsa
from bilevel_flax.contrib.vrbo import vrbo

__all__ = [
    "bsa",
    "bsg",
    "bsgo",
    "darts1",
    "darts2",
    "fsla",
    "masoba",
    "mrbo",
    "spaba",
    "sustain",
    "ttsa",
    "vrbo",
]
