"""Whole jobs in one call."""

from bilevel_flax.recipes.clean import Cleaned, Suspicious, clean
from bilevel_flax.recipes.networks import Network

__all__ = ["Cleaned", "Network", "Suspicious", "clean"]
