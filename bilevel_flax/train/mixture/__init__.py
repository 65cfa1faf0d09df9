"""A run's learned mixture in the formats of those who train with it: docs/mixture_export.md."""

from bilevel_flax.train.mixture.command import Options, export
from bilevel_flax.train.mixture.learned import LearnedMixture, Stage, load
from bilevel_flax.train.mixture.readers import READERS

__all__ = ["READERS", "LearnedMixture", "Options", "Stage", "export", "load"]
