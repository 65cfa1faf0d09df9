"""Metric writers: strict JSON, resuming byte for byte, clu's method names."""

import contextlib
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from bilevel_flax.train.metrics import JsonlWriter, MultiWriter, TensorBoardWriter, read_metrics


def write_steps(path, steps):
    with contextlib.closing(JsonlWriter(path)) as writer:
        for step in steps:
            writer.write_scalars(step, {"loss": np.float32(1 / (step + 1)), "count": step})


def strict(line):
    def refuse(name):
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


def test_a_line_is_a_json_object_with_the_step_first(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with contextlib.closing(JsonlWriter(path)) as writer:
        writer.write_scalars(
            np.int64(7), {"a": jnp.float32(0.1), "b": jnp.ones((1, 1), jnp.bfloat16), "c": True}
        )
    assert path.read_text() == '{"step": 7, "a": 0.1, "b": 1.0, "c": true}\n'


def test_numbers_that_are_not_finite_stay_strict_json_and_can_be_told_apart(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(JsonlWriter(path)) as writer:
        writer.write_scalars(0, {"a": math.nan, "b": jnp.inf, "c": np.float32(-np.inf)})
    row = strict(path.read_text())
    assert math.isnan(float(row["a"]))
    assert float(row["b"]) == math.inf
    assert float(row["c"]) == -math.inf


@given(st.floats(width=32, allow_nan=False))
def test_a_float32_is_read_back_exactly(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with contextlib.closing(JsonlWriter(path)) as writer:
        writer.write_scalars(0, {"a": np.float32(value)})
    assert np.float32(float(read_metrics(path)[0]["a"])) == np.float32(value)


@pytest.mark.parametrize("value", [np.ones(2), np.ones(0), "high", None, 1j])
def test_what_is_not_one_number_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(JsonlWriter(path)) as writer:
        with pytest.raises(ValueError, match="'gap'.*expected one number"):
            writer.write_scalars(0, {"loss": 1.0, "gap": value})
        with pytest.raises(ValueError, match="'step'"):
            writer.write_scalars(0, {"step": 1.0})
    assert path.read_bytes() == b""


@given(cut=st.integers(0, 700), checkpoint=st.integers(-1, 9))
def test_resuming_after_a_kill_anywhere_equals_the_uninterrupted_file(
    tmp_path_factory, cut, checkpoint
):
    folder = tmp_path_factory.mktemp("resume")
    whole, killed = folder / "whole.jsonl", folder / "killed.jsonl"
    write_steps(whole, range(20))
    # The checkpoint's lines are in the file: the loop flushes the writers before it saves.
    reached = len(b"".join(whole.read_bytes().splitlines(keepends=True)[: checkpoint + 1]))
    killed.write_bytes(whole.read_bytes()[: max(cut, reached)])

    with contextlib.closing(JsonlWriter(killed)) as writer:
        writer.truncate_after(checkpoint)
        for step in range(checkpoint + 1, 20):
            writer.write_scalars(step, {"loss": np.float32(1 / (step + 1)), "count": step})
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def test_opening_again_appends_and_mends_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 1])
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [0, 1]
    write_steps(path, [5])
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 5]


def test_truncating_twice_or_beyond_the_end_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(5))
    before, inode = path.read_bytes(), path.stat().st_ino
    with contextlib.closing(JsonlWriter(path)) as writer:
        writer.truncate_after(100)
        writer.truncate_after(4)
    assert path.read_bytes() == before
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}', '{"step": "one"}'])
def test_a_foreign_line_is_named_and_the_file_is_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    with (
        contextlib.closing(JsonlWriter(tmp_path / "other.jsonl")),
        pytest.raises(ValueError, match="line 2"),
    ):
        JsonlWriter(path).truncate_after(1)
    assert path.read_text() == content


def read_events(folder):
    """The events of a TensorBoard folder: length, its checksum, data, its checksum, again."""
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            size = int.from_bytes(content[position : position + 8], "little")
            yield Event.FromString(content[position + 12 : position + 12 + size])
            position += 12 + size + 4


def test_tensorboard_events_hold_what_was_written(tmp_path):
    with contextlib.closing(TensorBoardWriter(tmp_path)) as writer:
        writer.write_scalars(3, {"loss": jnp.float32(0.25)})
        writer.write_images(
            3, {"one": np.zeros((4, 5, 1), np.uint8), "grid": np.ones((2, 4, 4, 3), np.float32)}
        )
        writer.write_histograms(
            3, {"weights": np.array([0.0, 1.0, np.nan]), "none": np.array([np.nan])}, {"weights": 4}
        )
        writer.write_texts(3, {"note": "hello"})
        writer.write_hparams({"inner_lr": 0.1})
        writer.flush()
    values = {v.tag: v for event in read_events(tmp_path) for v in event.summary.value}
    assert values["loss"].simple_value == 0.25
    assert (values["one"].image.height, values["one"].image.width) == (4, 5)
    assert values["weights"].histo.num == 2
    assert list(values["weights"].histo.bucket) == [1, 0, 0, 1]
    assert "none" not in values
    assert b"hello" in values["note/text_summary"].tensor.string_val[0]
    assert b"| inner_lr | `0.1` |" in values["hparams/text_summary"].tensor.string_val[0]


def test_an_image_without_channels_is_refused_by_name(tmp_path):
    with (
        contextlib.closing(TensorBoardWriter(tmp_path)) as writer,
        pytest.raises(ValueError, match="'digits'.*shape"),
    ):
        writer.write_images(0, {"digits": np.zeros((10, 28, 28))})


class Recorder:
    def __init__(self, fail=False):
        self.calls, self.fail = [], fail

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            if self.fail and name == "close":
                raise OSError("disk full")

        return call


def test_a_multi_writer_hands_every_call_on_and_closes_all_even_if_one_fails():
    first, second = Recorder(fail=True), Recorder()
    writer = MultiWriter([first, second])
    writer.write_scalars(1, {"a": 1.0})
    writer.write_images(1, {})
    writer.write_histograms(1, {})
    writer.write_texts(1, {})
    writer.write_hparams({})
    writer.flush()
    with pytest.raises(OSError, match="disk full"):
        writer.close()
    assert first.calls == second.calls
    assert [call[0] for call in second.calls] == [
        "write_scalars",
        "write_images",
        "write_histograms",
        "write_texts",
        "write_hparams",
        "flush",
        "close",
    ]
