"""A state comes back from an update with the dtypes that it went in with, whatever these are.

Nothing is compiled: a `lax.scan`, a compiled step's cache and a checkpoint ask for no more.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel_flax as bf
from bilevel_flax import contrib

BATCHES = {"num_inner_batches": 3, "num_outer_batches": 2}
SOLVES = {"inner_steps": 2, "adjoint_steps": 2}
ADAM, SGD = optax.adamw(1e-3), optax.sgd(0.1)
BOTH = {"inner": SGD, "outer": SGD}
SOLVERS = {
    "auto": lambda p: bf.auto(p, inner=ADAM, steps=9),
    "auto, sgd, less often": lambda p: bf.auto(
        p, inner=SGD, steps=9, update_every=2, adjoint_update_every=2
    ),
    "auto, on less": lambda p: bf.auto(p, inner=ADAM, steps=9, subsample=0.5, cooldown=0.2),
    "soba, lookahead": lambda p: bf.soba(p, inner=optax.lookahead(ADAM, 2, 0.5), outer=SGD),
    "soba, all of v's": lambda p: bf.soba(
        p,
        inner=SGD,
        adjoint=bf.adjoint.bounded(
            bf.adjoint.damped(bf.adjoint.self_damped(bf.adjoint.in_own_units(ADAM)), 0.1), 9.0
        ),
        outer=optax.adam(optax.linear_schedule(0.1, 0.0, 9)),
    ),
    "saba": lambda p: bf.saba(p, **BOTH, **BATCHES),
    "srba": lambda p: bf.srba(p, **BOTH, **BATCHES, period=4),
    "storm": lambda p: bf.storm(p, **BOTH),
    "masoba": lambda p: contrib.masoba(p, **BOTH),
    "fsla": lambda p: contrib.fsla(p, **BOTH),
    "first_order": lambda p: bf.first_order(p, inner=ADAM, steps=9),
    "implicit": lambda p: bf.implicit(p, **BOTH, **SOLVES),
    "amigo": lambda p: bf.amigo(p, **BOTH, **SOLVES),
    "stocbio": lambda p: bf.stocbio(p, **BOTH, **SOLVES, adjoint_step=0.1),
    "unrolled": lambda p: bf.unrolled(p, inner=ADAM, outer=SGD, inner_steps=2),
    "f2sa": lambda p: bf.f2sa(p, **BOTH, inner_steps=2),
}


def loss(z, x, batch):
    fit = jnp.mean((batch @ z["w"].astype(batch.dtype) - 1) ** 2)
    return fit + jnp.sum(jax.nn.softplus(x["s"])) * jnp.sum(z["w"] ** 2)


@pytest.mark.parametrize(
    ("of_z", "of_x"), [(jnp.float64, jnp.float64), (jnp.bfloat16, jnp.float64)]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_dtypes_stay(name, of_z, of_x, x64):
    solver = SOLVERS[name](bf.Problem(loss, loss))
    z = {"w": jnp.ones(3, of_z), "count": jnp.int32(0)}
    state = solver.init(z, {"s": jnp.ones((), of_x)})
    several = solver.batches != (1, 1)
    ids = [jnp.zeros(n if several else (), jnp.int32) for n in solver.batches]
    batch = bf.Batch(*(jnp.ones((*each.shape, 4, 3), of_z) for each in ids), *ids)
    after, _ = jax.eval_shape(solver.update, state, batch)
    of = lambda tree: {
        jax.tree_util.keystr(path): (leaf.dtype, leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    assert of(after) == of(state)
    assert of(jax.eval_shape(solver.refresh, state, batch._replace(outer=None))) == of(state)
