"""Methods of two loops: z is solved for (roughly), then v, then x takes its step."""

from bilevel_flax.solvers.nested.amigo import amigo
from bilevel_flax.solvers.nested.f2sa import f2sa
from bilevel_flax.solvers.nested.implicit import implicit
from bilevel_flax.solvers.nested.stocbio import stocbio
from bilevel_flax.solvers.nested.unrolled import unrolled

__all__ = ["amigo", "f2sa", "implicit", "stocbio", "unrolled"]
