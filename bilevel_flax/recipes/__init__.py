"""Whole jobs in one call."""

from bilevel_flax.recipes.clean import clean
from bilevel_flax.recipes.cleaned import Cleaned, Suspicious
from bilevel_flax.recipes.networks import Network

__all__ = ["Cleaned", "Network", "Suspicious", "clean"]
