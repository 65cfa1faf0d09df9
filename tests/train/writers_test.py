"""Metric writers: strict JSON, resuming byte for byte, clu's methods; no failure stops a run."""

import contextlib
import dataclasses
import io
import json
import math
import threading
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX
import tiny_task
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX import event_file_writer
from tensorboardX.proto.event_pb2 import Event

from bilevel_flax.train.experiment import train_and_evaluate
from bilevel_flax.train.metrics import (
    JsonlWriter,
    MultiWriter,
    TensorBoardWriter,
    as_scalars,
    open_writers,
    read_metrics,
    writers,
)
from bilevel_flax.train.metrics.progress_bar import Progress


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
    with contextlib.closing(TensorBoardWriter(tmp_path, purge_step=3)) as writer:
        writer.write_scalars(3, {"loss": jnp.float32(0.25)})
        writer.write_texts(3, {"note": "hello"})
        writer.flush()
        events = list(read_events(tmp_path))
    values = {v.tag: v for event in events for v in event.summary.value}
    assert values["loss"].simple_value == 0.25
    assert b"hello" in values["note/text_summary"].tensor.string_val[0]
    # TensorBoard hides what an interrupted session had written from the marked step on.
    assert [event.step for event in events if event.session_log.status == 1] == [3]


def test_opening_many_lines_takes_linear_time(tmp_path):
    def seconds(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"step": {i}, "loss": 0.5}}\n' for i in range(count)))
        began = time.process_time()
        with contextlib.closing(JsonlWriter(path)) as writer:
            writer.truncate_after(count)
        return time.process_time() - began

    # Eight times the lines took 64 times as long; 80,000 of them 192 s.
    assert seconds(80_000) < 24 * max(seconds(10_000), 0.02)


class Recorder:
    """Has the methods of clu's interface; fails or waits where it is told to."""

    def __init__(self, fails=(), waits=None):
        self.calls, self.fails, self.waits = [], fails, waits

    def _call(self, name, *args):
        if self.waits is not None and name != "close":
            self.waits.wait()
        self.calls.append((name, *args))
        if name in self.fails:
            raise OSError(28, "No space left on device")

    def write_scalars(self, step, scalars):
        self._call("write_scalars", step, scalars)

    def write_texts(self, step, texts):
        self._call("write_texts", step, texts)

    def flush(self):
        self._call("flush")

    def close(self):
        self._call("close")


def test_two_threads_that_leave_a_writer_out_say_so_once():
    """The writer's own, where it raises, and the run's, where its queue is full."""

    class Flag:
        """Lets another thread in wherever it is read."""

        value = False

        def __get__(self, worker, kind):
            before = self.value
            time.sleep(0.05)
            return before

        def __set__(self, worker, value):
            self.value = value

    kind, lines = type("Worker", (writers._Worker,), {"_is_out": Flag()}), []
    worker = kind(Recorder(), lines.append)
    threads = [threading.Thread(target=worker._leave_out, args=("why",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.call("close")
    assert len(lines) == 1


class Hanging(Recorder):
    """Does not answer before it is let go."""

    def __init__(self):
        super().__init__(waits=threading.Event())


def names(writer):
    return [call[0] for call in writer.calls]


def test_every_call_reaches_every_writer_before_it_returns():
    writers = [Recorder(), Recorder()]
    multi = MultiWriter(writers)
    multi.write_scalars(1, {"a": 1.0})
    assert all(writer.calls == [("write_scalars", 1, {"a": 1.0})] for writer in writers)
    multi.write_texts(1, {"note": "hello"})
    multi.flush()
    multi.close()
    multi.close()
    expected = ["write_scalars", "write_texts", "flush", "close"]
    assert [names(writer) for writer in writers] == [expected, expected]


@pytest.mark.parametrize("method", ["write_scalars", "write_texts", "flush", "close"])
def test_a_writer_that_fails_says_so_once_and_is_left_out(method):
    bad, good, lines = Recorder(fails=[method]), Recorder(), []
    multi = MultiWriter([bad, good], lines.append)
    for step in range(3):
        multi.write_scalars(step, {"a": 1.0})
        multi.write_texts(step, {"note": "hello"})
        multi.flush()
    multi.close()
    assert len(lines) == 1
    assert "Recorder failed ([Errno 28] No space left on device)" in lines[0]
    assert len(good.calls) == 10
    assert names(bad).count(method) == 1


def test_a_writer_that_hangs_hinders_neither_the_run_nor_its_end(monkeypatch):
    monkeypatch.setattr(writers, "_SECONDS", 0.5)
    hangs, good, lines = Hanging(), Recorder(), []
    multi = MultiWriter([hangs, good], lines.append)
    began = time.monotonic()
    for step in range(writers._PENDING + 100):
        multi.write_scalars(step, {"a": 1.0})
    multi.close()
    assert time.monotonic() - began < 10  # waiting at every call it would be nine minutes
    assert len(good.calls) == writers._PENDING + 101
    # On a busy machine the good one may be late as well, once, and loses nothing by it.
    late, out = [line for line in lines if "Hanging" in line]
    assert "has not answered for 0.5 s" in late
    assert "1000 calls behind" in out
    hangs.waits.set()


def test_a_writer_that_only_paused_gets_all_its_calls(monkeypatch):
    monkeypatch.setattr(writers, "_SECONDS", 0.2)
    slow, lines = Recorder(waits=threading.Event()), []
    multi = MultiWriter([slow], lines.append)
    for step in range(5):
        multi.write_scalars(step, {"a": 1.0})
    slow.waits.set()
    multi.close()
    assert [call[1] for call in slow.calls if call[0] == "write_scalars"] == list(range(5))
    assert names(slow)[-1] == "close"
    assert len(lines) == 1


def test_what_is_no_writer_is_refused_by_name():
    with pytest.raises(TypeError, match=r"list has no method write_scalars\(\)"):
        MultiWriter([[]])  # pyright: ignore[reportArgumentType]


class FullDisk:
    """A file on a disk that has no room for a while."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_disk_that_is_full_for_a_moment_costs_the_writer_and_not_the_run(tmp_path):
    lines = []
    multi = open_writers(tmp_path, 0, [], lines.append)
    multi.write_scalars(1, {"a": 1.0})
    _, board = [worker._writer for worker in multi._workers]
    record = board._file._py_recordio_writer
    record._writer, real = FullDisk(record._writer), record._writer
    multi.write_scalars(2, {"a": 2.0})
    record._writer = real
    multi.write_scalars(3, {"a": 3.0})
    multi.close()
    assert len(lines) == 1
    assert "TensorBoardWriter failed" in lines[0]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_whose_tensorboard_cannot_even_be_opened_goes_on(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    lines = []
    multi = open_writers(tmp_path, 0, [], lines.append)
    multi.write_scalars(1, {"a": 1.0})
    multi.close()
    assert len(lines) == 1
    assert "TensorBoardWriter failed" in lines[0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


class OfTensorboardX:
    """A user's own writer on tensorboardX's `SummaryWriter`, with its thread and queue."""

    def __init__(self, folder):
        self._writer = tensorboardX.SummaryWriter(str(folder), max_queue=2)

    def kill_thread(self):
        worker = self._writer.file_writer.event_writer._worker
        worker._queue.put(worker._shutdown_signal)  # as an OSError in it ends it
        worker.join()

    def write_scalars(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_texts(self, step, texts):
        pass

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


def test_tensorboardx_with_its_thread_dead_does_not_hang_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_SECONDS", 0.2)
    # Its own exit handler would wait for the queue as well.
    monkeypatch.setattr("atexit.register", lambda function: function)
    dead, lines = OfTensorboardX(tmp_path / "theirs"), []
    dead.kill_thread()
    multi = open_writers(tmp_path, 0, [dead], lines.append)
    began = time.monotonic()
    for step in range(1, 20):
        multi.write_scalars(step, {"a": 1.0})
    multi.close()
    assert time.monotonic() - began < 3
    assert len(lines) == 1
    assert "OfTensorboardX has not answered" in lines[0]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 19


@flax.struct.dataclass
class Mean:
    """A metric as clu's are: a PyTree with `compute()`."""

    total: jax.Array
    count: jax.Array

    def compute(self):
        return self.total / self.count


@flax.struct.dataclass
class Collection:
    error: Mean

    def compute(self):
        return {"error": self.error.compute()}


def test_metrics_with_compute_are_results_of_an_evaluation():
    mean = Mean(jnp.float32(3.0), jnp.float32(4.0))
    assert as_scalars(Collection(mean)) == {"error": 0.75}
    assert as_scalars({"error": mean, "count": np.int64(4)}) == {"error": 0.75, "count": 4.0}


def test_clus_own_metrics_are_results_of_an_evaluation():
    metrics = pytest.importorskip("clu.metrics")  # an extra: the project runs without it
    kind = metrics.Collection.create(
        accuracy=metrics.Accuracy, loss=metrics.Average.from_output("loss")
    )
    logits, labels = jnp.eye(4)[jnp.array([0, 1, 2, 2])], jnp.arange(4)
    collection = kind.single_from_model_output(logits=logits, labels=labels, loss=jnp.ones(4) / 2)
    assert as_scalars(collection) == {"accuracy": 0.75, "loss": 0.5}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (None, "returned None"),
        (0.5, "returned 0.5"),
        ([("error", 0.5)], "a dict of numbers"),
        ({"": 0.5}, "the name ''"),
        ({"  ": 0.5}, "the name '  '"),
        ({"step": 5}, "the name 'step'"),
        ({3: 0.5}, "the name 3"),
        ({"error": np.ones(2)}, "'error': expected one number"),
        ({"error": "low"}, "'error': expected one number"),
        ({"error": None}, "'error': expected one number"),
    ],
)
def test_what_is_no_result_of_an_evaluation_is_named(results, message):
    with pytest.raises((TypeError, ValueError), match=message):
        as_scalars(results)


def collect(config):
    """The tiny task, with a collection of metrics as its evaluation."""
    mean = lambda state: Mean(jnp.abs(state.inner_params - 0.5), jnp.float32(1.0))
    return dataclasses.replace(
        tiny_task.make_task(config),
        evaluate=lambda state: Collection(mean(state)),
        best_metric="error",
        units={"error": "fraction"},
    )


def test_a_run_outlives_its_writers(tmp_path, monkeypatch, capsys):
    """A full disk under TensorBoard and a foreign writer that hangs, from the first line on."""
    monkeypatch.setattr(writers, "_SECONDS", 0.2)

    def full(self, event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", full)
    hangs, good = Recorder(waits=threading.Event()), Recorder()
    config = tiny_task.get_config(task={"call": "writers_test:collect"})
    summary = train_and_evaluate(config, tmp_path, metric_writers=[hangs, good])
    hangs.waits.set()
    assert summary["steps"] == 20
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert good.calls[0] == ("write_scalars", 5, {k: v for k, v in rows[0].items() if k != "step"})
    assert names(good)[-1] == "close"
    printed = "".join(capsys.readouterr())
    assert printed.count("TensorBoardWriter failed") == 1
    assert printed.count("Recorder has not answered") == 1
    assert json.loads((tmp_path / "units.json").read_text()) == {"error": "fraction"}


def test_the_speed_shown_is_that_of_the_updates():
    stream = io.StringIO()
    progress = Progress(100, stream, every_seconds=0.0)
    progress.update(10)
    time.sleep(0.02)  # an evaluation
    progress.update(20, {"loss": 0.5}, pace=3250.0)
    assert "step 20/100  3250 step/s" in stream.getvalue().splitlines()[-1]
