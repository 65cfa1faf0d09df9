"""What a step needs on a pod, found out by compiling it without one."""

from bilevel_flax.plan.collectives import collectives
from bilevel_flax.plan.command import Options, run

__all__ = ["Options", "collectives", "run"]
