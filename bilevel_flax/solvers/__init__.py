"""The methods, one a file."""

from bilevel_flax.solvers.soba import soba

__all__ = ["soba"]
