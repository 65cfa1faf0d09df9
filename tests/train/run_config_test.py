"""The schema of a run: defaults, old layouts, and every slip of the pen in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections
import pytest
from tiny_task import get_config

from bilevel_flax import cli
from bilevel_flax.train import config as configs
from bilevel_flax.train import run_config, workdir
from bilevel_flax.train.errors import ConfigError, nearest
from bilevel_flax.train.run_config import KEYS, RunConfig
from bilevel_flax.train.setup import make_task

ROOT = Path(__file__).parents[2]
NOTHING = {"call": "builtins:dict"}


def minimal(**more: Any) -> ml_collections.ConfigDict:
    """Only what has no default."""
    return ml_collections.ConfigDict({"steps": 3, "task": NOTHING, "solver": NOTHING} | more)


def test_what_a_config_leaves_out_has_its_default():
    run = RunConfig.read(minimal())
    for name, key in KEYS.items():
        group, _, last = name.rpartition(".")
        value = getattr(getattr(run, group) if group else run, last)
        if name not in ("task", "solver", "steps"):
            assert value == key.default, name
    assert run.steps == 3


def test_every_key_has_a_line_and_the_docs_have_all_of_them():
    for name, key in KEYS.items():
        assert key.doc and "\n" not in key.doc, name
    assert run_config.table() in (ROOT / "docs" / "loops.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_evry": 3}, 'config.log_evry: there is no such key (did you mean "log_every"?)'),
        ({"sed": 1}, 'did you mean "seed"?'),
        ({"checkpoints": {"every": 3}}, 'did you mean "checkpoint"?'),
        ({"on_devices": True}, 'did you mean "on_device"?'),
        ({"checkpoint": {"evry": 3}}, "checkpoint.evry: unknown, choose among every, keep, req"),
        ({"health": {"summry": 3}}, '(did you mean "summary"?)'),
        ({"problem": {"microbatch": 3}}, '(did you mean "microbatches"?)'),
        ({"checkpoint": 5}, "config.checkpoint=5: write a dict"),
        ({"steps": 2.5}, "--config.steps must be an integer >= 1, got 2.5"),
        ({"steps": True}, "--config.steps must be an integer >= 1, got True"),
        ({"steps": 0}, "--config.steps must be an integer >= 1, got 0"),
        ({"steps": None, "epochs": -1.0}, "--config.epochs=-1.0: must be above 0"),
        ({"steps": None}, "--config.steps: say how many, or set --config.epochs"),
        ({"seed": -1}, "--config.seed must be an integer >= 0, got -1"),
        ({"log_every": None}, "--config.log_every=None: expected int"),
        ({"mesh": 8}, "--config.mesh=8: expected str"),
        ({"on_device": "yes"}, "--config.on_device='yes': expected bool"),
        ({"reduction": "shardmap"}, 'gspmd, None (did you mean "shard_map"?)'),
        ({"task": None}, "config.task is missing: write config.task ="),
        ({"solver": "soba"}, "config.solver is missing"),
    ],
)
def test_a_slip_is_one_line(change: dict[str, Any], message: str):
    config = minimal()
    with config.unlocked():
        for name in change:
            if name in config:
                del config[name]
        config.update(change)
    with pytest.raises(ValueError) as caught:
        RunConfig.read(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_of_the_task_may_look_like_one_of_the_run():
    config = minimal(seed=1, seeds=(1, 2))
    assert RunConfig.read(config).source.seeds == (1, 2)


def old_layout() -> ml_collections.ConfigDict:
    """As the config files stated it before there was a schema."""
    holder = ml_collections.config_dict.placeholder
    return ml_collections.ConfigDict(
        {
            "name": "old",
            "seed": 0,
            "steps": 10,
            "log_every": 10,
            "eval_every": 5,
            "checkpoint": {"every": 5, "keep": 2},
            "health": {"share": 0.0, "every": holder(int), "summary": False},
            "on_device": holder(bool),
            "mesh": "data=8",
            "collectives": "floor",
            "rules": holder(tuple),
            "problem": {"remat": False, "microbatches": 1, "compute_dtype": holder(str)},
            "task": NOTHING,
            "solver": NOTHING,
        }
    )


def test_a_config_of_the_old_layout_works():
    with (
        pytest.warns(DeprecationWarning, match="health.share=0.0 is now config.health.every=0"),
        pytest.warns(DeprecationWarning, match="collectives='floor' is now config.reduction"),
    ):
        run = RunConfig.read(old_layout())
    assert (run.reduction, run.health.every, run.checkpoint.keep) == ("shard_map", 0, 2)
    assert "collectives" not in run.source


def test_an_old_key_on_the_command_line_works(tmp_path: Path):
    path = tmp_path / "configs" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'steps': 1, 'task': {'call': 'a:b'}})\n"
    )
    with pytest.warns(DeprecationWarning, match="is now config.reduction='gspmd'"):
        assert configs.load(str(path), ["collectives=xla"]).reduction == "gspmd"
    for share, every in (("0.0", 0), ("0.03", None)):
        with pytest.warns(DeprecationWarning, match="health.share"):
            assert configs.load(str(path), [f"health.share={share}"]).health.every == every


def test_a_run_of_the_old_layout_is_resumed_and_another_is_not(tmp_path: Path):
    record = configs.plain(old_layout())
    workdir.write_json(tmp_path / "config.json", record)
    workdir.write_json(tmp_path / "summary.json", {})
    now = minimal(steps=10, eval_every=5)
    workdir.check_same_run(tmp_path, RunConfig.read(now).record)
    for change, line in (
        ({"eval_every": 6}, "eval_every: saved 5, now 6"),
        ({"problem": {"microbatches": 2}}, "problem.microbatches: saved 1, now 2"),
    ):
        other = minimal(steps=10, eval_every=5)
        other.update(change)
        with pytest.raises(ConfigError, match=line):
            workdir.check_same_run(tmp_path, RunConfig.read(other).record)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("solver.lr", ' (did you mean "solver.inner.learning_rate"?)'),
        ("solver.inner.lr", ' (did you mean "solver.inner.learning_rate"?)'),
        ("solver.inner.learning_rat", ' (did you mean "solver.inner.learning_rate"?)'),
        ("solvr.call", ' (did you mean "solver.call"?)'),
        ("solver.temperature", ""),
        ("stpes", ' (did you mean "steps"?)'),
        ("colour", ""),
        ("checkpoint.evry", ' (did you mean "checkpoint.every"?)'),
    ],
)
def test_a_hint_is_given_only_where_it_is_right(name: str, hint: str):
    known = ["steps", "solver.call", "solver.inner.call", "solver.inner.learning_rate"]
    assert nearest(name, [*known, "checkpoint.every", "health.every"]) == hint


def reads_a_missing_key(config: Any) -> Any:
    return config.corruption


def reads_twice(config: Any) -> Any:
    return [config.corruption, config.data.get("held_out", 0.0)].clear()


def returns_nothing(config: Any) -> Any:
    del config


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "reads_a_missing_key",
            "no key 'corruption', which the task reads (did you mean \"corruptoin",
        ),
        ("returns_nothing", "run_config_test:returns_nothing returned a NoneType, not a"),
    ],
)
def test_a_task_that_is_none_is_one_line(function: str, message: str):
    with pytest.raises(ConfigError) as caught:
        make_task(minimal(task={"call": f"run_config_test:{function}"}, corruptoin=0.5))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"corruptoin": 0.3}, 'config.corruptoin: nothing reads it (did you mean "corruption"?)'),
        ({"data": {"heldout": 0.1}}, '(did you mean "data.held_out"?)'),
        ({"colour": "red", "data": {"path": "x"}}, "returned a NoneType"),  # nobody's business
    ],
)
def test_a_misspelt_key_of_the_task_is_one_line(more: dict[str, Any], message: str):
    task = {"call": "run_config_test:reads_twice"}
    config = minimal(task=task, **{"corruption": 0.5, "data": {}} | more)
    with pytest.raises(ConfigError) as caught:
        make_task(config)
    assert message in str(caught.value)
    assert type(config) is type(config.data) is ml_collections.ConfigDict


def test_a_solver_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # By the command line: a file of the user's own that states nothing but what it must.
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.py").write_text("from tiny_task import get_config\n")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    command = ["train", "--config", str(folder / "mine.py"), "--workdir", str(tmp_path / "run")]
    assert cli.main([*command, "--config.solver.call=optax:adam"]) == 2
    assert "takes no argument 'inner'" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path):
    (tmp_path / ".hidden").touch()
    with workdir.lock(tmp_path):
        pass
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(ConfigError, match=r"not empty and holds no run \(thesis.tex\)"),
        workdir.lock(tmp_path),
    ):
        pass
    workdir.write_json(tmp_path / "config.json", configs.plain(get_config()))
    with workdir.lock(tmp_path):
        pass
