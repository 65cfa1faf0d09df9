"""Collectives read from HLO: every instruction counts as often as it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_flax.plan.collectives import collectives, instructions, result_bytes


def compiled(unroll: int | bool) -> tuple[dict, int]:
    """Collectives and loops of layers, scanned or not: FSDP gathers, reduced gradients."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = P(None, None, None, "fsdp"), P(("data", "fsdp"))

    def layer(x, w):
        x = jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", axis=1, tiled=True))
        return x / jax.lax.psum((x**2).sum(0)[None], ("data", "fsdp")), None

    def step(weights, x):
        group = lambda x, ws: jax.lax.scan(layer, x, ws, unroll=unroll)
        return jax.lax.scan(group, x, weights, unroll=unroll)[0]

    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((3, 2, 64, 64), (16, 64)), specs, strict=True)
    )
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False)
    text = jax.jit(mapped).lower(*arguments).compile().as_text()
    return collectives(text), text.count(" while(")


def test_a_scanned_step_counts_as_the_unrolled_one():
    scanned, loops = compiled(1)
    assert loops >= 2
    unrolled, loops = compiled(True)
    assert loops == 0
    layers = 3 * 2
    assert scanned == {
        "all-reduce": {"count": layers, "bytes": layers * 64 * 4},
        "all-gather": {"count": layers, "bytes": layers * 64 * 64 * 4},
    }
    # XLA may combine collectives of the unrolled one; their bytes stay.
    sizes = lambda kinds: {kind: sums["bytes"] for kind, sums in kinds.items()}
    assert sizes(unrolled) == sizes(scanned)


def module(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    header = "HloModule m, is_scheduled=true\n"
    return f"{header}{before}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def computation(name: str, *lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"\n%{name} (a: (s32[], f32[8])) -> (s32[], f32[8]) {{\n{body}\n}}\n"


REDUCE = "%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add"


def loop(trips: int, body: str) -> str:
    return (
        f"%w = (s32[], f32[8]) while(%t), condition=%cond, body=%{body}, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}},"known_init_step":{{"init":"0"}}}}'
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[2]{0}, (s32[3]{0}, pred[5]{0}), /*index=2*/u8[0]{0})", 8 + 12 + 5),
        ("s4[7]{0:E(4)}", 4),
        ("f8e4m3fn[16]{0}", 16),
        ("c64[2]", 16),
        ("token[]", 0),
        ("f32[<=8,2]{1,0}", 64),
    ],
)
def test_bytes_of_types(shape: str, size: int):
    assert result_bytes(shape) == size


def test_an_unknown_element_type_is_named():
    with pytest.raises(ValueError, match="'xyz'"):
        result_bytes("xyz[3]")


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match=r"compiled.as_text\(\)"):
        collectives("HloModule empty")


def test_combined_results_are_one_collective():
    text = module(
        "%r = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%x, %y), replica_groups={}, to_apply=%add"
    )
    assert collectives(text) == {"all-reduce": {"count": 1, "bytes": 32 + 16}}


def test_loops_multiply_and_nest():
    inner = computation("body", REDUCE)
    outer = computation(
        "outer_body", loop(5, "body"), "%g = f32[32]{0} all-gather(%x), dimensions={0}"
    )
    text = module(
        loop(3, "outer_body"),
        "%again = f32[8]{0} all-reduce(%y), to_apply=%add",
        before=inner + outer + computation("cond"),
    )
    assert collectives(text) == {
        "all-reduce": {"count": 16, "bytes": 16 * 32},
        "all-gather": {"count": 3, "bytes": 3 * 128},
    }


def test_the_trip_count_may_stand_in_the_condition_alone():
    loop = "%w = (s32[], f32[8]) while(%t), condition=%cond, body=%body"
    fused = computation("fused", "%n.1 = s32[] constant(7)", "ROOT %l = pred[] compare(%i, %n.1)")
    condition = computation("cond", "ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%fused")
    text = module(loop, before=computation("body", REDUCE) + fused + condition)
    assert collectives(text)["all-reduce"]["count"] == 7


def test_a_loop_that_decides_itself_runs_as_often_as_told():
    loop = "%w = (s32[], f32[8]) while(%t), condition=%cond, body=%body"
    text = module(loop, before=computation("body", REDUCE) + computation("cond"))
    assert collectives(text)["all-reduce"]["count"] == 1
    assert collectives(text, unknown_trips=10)["all-reduce"]["count"] == 10


def test_an_asynchronous_pair_is_one_collective_of_its_result():
    text = module(
        "%s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], "
        'dimensions={0}, metadata={op_name="step/gather"}',
        '%c = f32[2]{0} custom-call(%y), custom_call_target="work"',
        "%d = f32[32]{0:T(256)S(1)} all-gather-done(%s)",
        "%p = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0}}",
        "%q = f32[8]{0} collective-permute-done(%p)",
    )
    assert collectives(text) == {
        "all-gather": {"count": 1, "bytes": 128},
        "collective-permute": {"count": 1, "bytes": 32},
    }
    gather = instructions(text)[0]
    assert (gather.group_size, gather.op_name) == (4, "step/gather")


def test_an_asynchronous_computation_is_called_once():
    wrapped = computation("wrapped", "ROOT %rs = f32[4]{0} reduce-scatter(%a), to_apply=%add")
    text = module(
        "%s = ((f32[32]{0}), f32[4]{0}, u32[]) async-start(%x), calls=%wrapped",
        "%u = ((f32[32]{0}), f32[4]{0}, u32[]) async-update(%s), calls=%wrapped",
        "%d = f32[4]{0} async-done(%u), calls=%wrapped",
        before=wrapped,
    )
    assert collectives(text) == {"reduce-scatter": {"count": 1, "bytes": 16}}


def test_a_tpu_reduces_and_scatters_in_one_fusion():
    fusion = computation(
        "all-reduce-scatter.clone.1",
        "%r = f32[1024,64]{1,0:T(8,128)} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, "
        "to_apply=%add",
        "ROOT %d = f32[256,64]{1,0:T(8,128)S(1)} dynamic-slice(%r, %i, %j)",
    )
    text = module(
        "%f = f32[256,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1",
        before=fusion,
    )
    assert collectives(text) == {"reduce-scatter": {"count": 1, "bytes": 256 * 64 * 4}}
    assert instructions(text)[0].group_size == 4


def test_one_collective_in_several_fusions_is_one():
    part = "%%g = bf16[64]{0} all-gather(%%a), channel_id=%d, replica_groups={{0,1}}"
    text = module(
        "%f = bf16[64]{0} fusion(%x), kind=kCustom, calls=%begin",
        "%g = bf16[64]{0} fusion(%x), kind=kCustom, calls=%beside",
        "%h = bf16[64]{0} fusion(%x), kind=kCustom, calls=%other",
        before=computation("begin", part % 7)
        + computation("beside", part % 7)
        + computation("other", part % 8),
    )
    assert collectives(text) == {"all-gather": {"count": 2, "bytes": 256}}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=2,'fsdp'=8] {'fsdp'}", 8),
        ("mesh['data'=2,'fsdp'=8] {'data','fsdp'}", 16),
        ("mesh['all'=16] {'all':(2)4}", 4),
        ("{}", None),
    ],
)
def test_group_sizes(groups: str, size: int | None):
    text = module(f"%r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add")
    assert instructions(text)[0].group_size == size


def test_a_group_of_one_moves_nothing():
    text = module("%r = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add")
    assert collectives(text) == {}


def test_of_a_conditionals_branches_the_larger_counts():
    branches = computation("small", REDUCE) + computation(
        "large", "%g = f32[64]{0} all-gather(%x), dimensions={0}"
    )
    text = module(
        "%c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%small, %large}",
        before=branches,
    )
    assert collectives(text) == {"all-gather": {"count": 1, "bytes": 256}}


def test_called_computations_count_at_every_call():
    text = module(
        "%a = f32[8]{0} call(%x), to_apply=%once",
        "%b = f32[8]{0} call(%x), to_apply=%once",
        before=computation("once", REDUCE),
    )
    assert collectives(text) == {"all-reduce": {"count": 2, "bytes": 64}}
