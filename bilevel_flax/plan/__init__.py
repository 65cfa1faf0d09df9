"""What a step needs on a pod, found out by compiling it without one."""

from bilevel_flax.plan.collectives import collectives

__all__ = ["collectives"]
