"""`bilevel-flax plan`: counted, compiled from shapes, and the same collectives as a real run's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bilevel_flax import cli
from bilevel_flax.oracles import flops
from bilevel_flax.plan import advice, command, step, topology
from bilevel_flax.plan.collectives import collectives
from bilevel_flax.plan.step import out_of_memory
from bilevel_flax.train import config as configs
from bilevel_flax.train.config import ConfigError
from bilevel_flax.train.run_config import RunConfig
from bilevel_flax.train.setup import make_layout, make_solver, make_task
from bilevel_flax.train.step_runner import StepRunner

ROOT = Path(__file__).parents[2]
CLEANING = "configs/mnist_hypercleaning.py:soba"
DECODER = "configs/lm_pod.py:tiny"
KEYS = {
    *("chips", "parameter_bytes", "hbm_bytes_needed", "hbm_bytes_available", "fits", "flops"),
    *("gradient_units", "collectives"),
}


@pytest.fixture
def planned_and_run(capsys: pytest.CaptureFixture[str]):
    """A plan, and the collectives of the chunk that a run compiles on the same devices."""

    def both(name: str, mesh: str, *overrides: str) -> tuple[dict, dict]:
        changes = [f"--config.{override}" for override in overrides]
        command = ["plan", "--config", name, "--topology", "cpu:8", "--mesh", mesh, "--json"]
        assert cli.main([*command, *changes]) == 0
        (printed,) = capsys.readouterr().out.splitlines()  # one object and nothing else
        config = RunConfig.read(configs.load(name, [f"mesh={mesh}", "steps=10", *overrides]))
        layout, task, _ = make_layout(config, make_task(config))
        assert layout is not None
        solver = make_solver(config.solver, task)
        start = task.init(jax.random.PRNGKey(0))
        state = layout.place_state(solver.init(start.inner_params, start.outer_params))
        loop = StepRunner(solver, task.inner, task.outer, layout=layout)
        loop.compile(state, 0)
        return json.loads(printed), collectives(loop._chunk.as_text())

    return both


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def moved(found: dict) -> dict[str, int]:
    return {kind: total["bytes"] for kind, total in found.items()}


def test_a_plan_says_what_a_run_on_eight_devices_does(planned_and_run):
    plan, run = planned_and_run(CLEANING, "data=8")
    assert plan.keys() >= KEYS
    assert (plan["chips"], plan["fits"]) == (8, True)
    assert plan["parameter_bytes"] == 784 * 10 * 4
    assert plan["memory"]["z"] == plan["memory"]["v"] == plan["parameter_bytes"]
    assert sum(plan["memory"].values()) >= plan["hbm_bytes_needed"]
    assert 3 < plan["gradient_units"] < 5
    reduced = plan["collectives"]["all-reduce"]["bytes"]
    assert 2 * plan["parameter_bytes"] <= reduced <= 2.05 * plan["parameter_bytes"]
    assert moved(plan["collectives"])["all-reduce"] == moved(run)["all-reduce"]


@pytest.mark.slow
@pytest.mark.parametrize("reductions", ["shard_map", "gspmd"])
def test_a_plan_of_the_decoder_says_what_a_run_does(planned_and_run, reductions: str):
    plan, run = planned_and_run(DECODER, "data=2,fsdp=4", f"reduction={reductions}")
    assert plan["memory"]["z"] < 0.3 * plan["parameter_bytes"]
    assert 3.5 < plan["gradient_units"] < 5
    planned, compiled = sum(moved(plan["collectives"]).values()), sum(moved(run).values())
    assert planned == pytest.approx(compiled, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology", "v9:2x2"], "unknown, choose among v4, v5e, v5p, v6e, cpu"),
        (["--topology", "v5e"], "give a generation and a shape"),
        (["--topology", "v5e:2x2x2"], "a torus of 2 axes"),
        (["--topology", "cpu:2x2"], "write cpu:4"),
        (["--topology", "cpu:1", "--mesh", "data=3"], "for 3 chips, but cpu:1 has 1"),
        (["--topology", "cpu:1", "--mesh", "model=1"], 'names the axis "model"'),
        (["--topology", "cpu:1", "--config.batch_sise=3"], 'did you mean "batch_size"'),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["plan", "--config", CLEANING, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert says in printed.err


def layers(unroll: int | bool, remat: bool) -> jax.stages.Traced:
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(weights, x):
        body = jax.checkpoint(layer) if remat else layer
        return (jax.lax.scan(body, x, weights, unroll=unroll)[0] ** 2).mean()

    shapes = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32), jnp.zeros((32, 64))
    return jax.jit(jax.grad(loss)).trace(*shapes)


def test_loops_count_as_often_as_they_run():
    product = 2 * 32 * 64 * 64
    scanned, unrolled = layers(1, False), layers(True, False)
    by_xla = unrolled.lower().compile().cost_analysis()["flops"]
    # XLA sees that nobody asks for the gradient of the first layer's input.
    assert flops.of(scanned.jaxpr) - product == pytest.approx(by_xla, rel=0.02)
    assert flops.of(unrolled.jaxpr) - product == pytest.approx(by_xla, rel=0.02)
    # A layer: forward, again, and two products backwards.
    assert flops.of(layers(1, True).jaxpr) == pytest.approx(6 * 4 * product, rel=0.03)


def test_convolutions_and_shard_map_count_whole():
    conv = jax.make_jaxpr(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16)))
    assert flops.of(conv) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)
    auto = (jax.sharding.AxisType.Auto,)  # JAX 0.12's default is Explicit
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.make_jaxpr(
        jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    )(jnp.zeros((16, 8)), jnp.zeros((8, 8)))
    assert flops.of(mapped) == 2 * 16 * 8 * 8


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G). HLO module: jit_f.",
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.",
    ],
)
def test_what_a_tpu_says_that_lacks_memory_is_a_figure(said: str):
    assert out_of_memory(said) == (int(20.5 * 2**30), topology.CHIPS["v5e"].hbm_bytes)
    assert out_of_memory("RESOURCE_EXHAUSTED: something else") is None


def test_topologies():
    pod = topology.parse("v5p:8x8x8")
    assert (pod.count, pod.chip) == (512, topology.CHIPS["v5p"])
    assert topology.parse("cpu:8") == ("cpu:8", 8, None)
    with pytest.raises(ConfigError, match="v5q"):
        topology.parse("v5q:4x4")


GIB = 2**30


def compiled(needed: int, arguments: int, limit: int | None = None) -> step.Compiled:
    return step.Compiled(needed, arguments, needed - arguments, [], 1.0, limit)


def test_another_compiler_gives_no_verdict_but_where_the_state_alone_is_too_large():
    asked = {"available": 16 * GIB, "another_compiler": True}
    assert command.verdict(compiled(18 * GIB, 2 * GIB), **asked) == (None, None)
    assert command.verdict(compiled(4 * GIB, 2 * GIB), **asked) == (None, None)
    assert command.verdict(compiled(18 * GIB, 17 * GIB), **asked) == (None, False)


def test_the_chips_own_compiler_decides():
    asked = {"available": 16 * GIB, "another_compiler": False}
    assert command.verdict(compiled(15 * GIB, 2 * GIB), **asked) == (15 * GIB, True)
    assert command.verdict(compiled(18 * GIB, 2 * GIB), **asked) == (18 * GIB, False)
    assert command.verdict(compiled(15 * GIB, 2 * GIB, limit=14 * GIB), **asked)[1] is False


def test_without_libtpu_a_plan_for_tpus_says_what_is_not_known(capsys, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    monkeypatch.setattr(command, "_PROGRESS_SECONDS", 0.05)
    assert cli.main(["plan", "--config", CLEANING, "--topology", "v5e:2x2"]) == 0
    printed = capsys.readouterr()
    assert "fits: not known" in printed.out and "bilevel-flax[plan]" in printed.out
    assert "at the least" in printed.out and "cheapest" not in printed.out
    assert "compiling the step for v5e:2x2" in printed.err and "s so far" in printed.err


PARTS = {"z": GIB, "v": GIB, "moments of z": 2 * GIB, "moments of v": 2 * GIB, "tables": 0}
PARTS["activations"] = 16 * GIB
MESH = {"data": 4, "fsdp": 4, "tensor": 1}
CONFIG = {"remat": False, "problem": {"microbatches": 1}}


def advised(available: int, reduces_once: bool = False) -> str:
    facts = {"reduces_once": reduces_once, "parameter_bytes": 4 * GIB}
    listed = advice.changes(PARTS, CONFIG, MESH, 64, **facts)
    return advice.cheapest(advice.split_activations(PARTS, **facts), listed, available)


def test_the_cheapest_change_that_suffices_is_named():
    assert advised(17 * GIB).startswith("--config.remat=True (")
    assert advised(14 * GIB).startswith("--config.problem.microbatches=4 (")
    assert "reduction=gspmd" in advised(11 * GIB, reduces_once=True)
    # 6 GiB of state to a quarter, 12 of the activations to a quarter, 4 stay.
    both = advised(9 * GIB)
    assert "microbatches=4" in both and "data=1,fsdp=16" in both
    assert both.endswith("about 8.5 GiB")


def test_no_two_changes_of_one_setting_are_advised_together():
    text = advised(GIB)
    assert text.startswith("none of these suffices")
    for words in ("--mesh", "microbatches"):
        assert text.count(words) <= 1
    assert not ("--mesh" in text and "twice the chips" in text)
    assert " and " in text
