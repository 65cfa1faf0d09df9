"""The first signal asks, the second Ctrl-C insists, and everything is as before afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bilevel_flax.train import preemption
from bilevel_flax.train.preemption import PreemptionGuard


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    # A job started in the background ignores Ctrl-C; these tests are about one that does not.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.signal(signal.SIGINT, inherited)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number: signal.Signals):
    with PreemptionGuard() as guard:
        assert guard.received is None
        os.kill(os.getpid(), number)
        assert guard.received is number


def test_sigterm_may_come_often_and_the_first_signal_counts():
    with PreemptionGuard() as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert guard.received is signal.SIGTERM


def test_the_second_interrupt_raises():
    with pytest.raises(KeyboardInterrupt), PreemptionGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.received is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did not raise")


def test_a_guard_can_be_entered_again():
    guard = PreemptionGuard()
    for _ in range(2):
        with guard:
            assert guard.received is None
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_not_asked_for_and_ignored_ones_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionGuard([signal.SIGINT]) as guard:
            assert signal.getsignal(signal.SIGTERM) is before
            os.kill(os.getpid(), signal.SIGINT)
            assert guard.received is None
    finally:
        signal.signal(signal.SIGINT, interrupt)


def test_another_thread_gets_a_guard_that_does_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with PreemptionGuard() as guard:
            seen.append((guard.received, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, True)]


STUCK = """
import ctypes, os, runpy, signal, sys, threading, time
PreemptionGuard = runpy.run_path(sys.argv[3])["PreemptionGuard"]  # without importing JAX

signal.signal(signal.SIGINT, signal.default_int_handler)
with PreemptionGuard(grace_seconds=30 if sys.argv[2] == "asked early" else 0.5) as guard:
    threading.Timer(0.2, os.kill, (os.getpid(), getattr(signal, sys.argv[1]))).start()
    if sys.argv[2] == "python":
        while True:
            time.sleep(1)
    elif sys.argv[2] == "extended":
        while guard.received is None:
            time.sleep(0.01)
        guard.extend(30)
        time.sleep(1.5)
    elif sys.argv[2] == "asked early":
        guard.extend(0.0)
        while guard.received is None:
            time.sleep(0.01)
        time.sleep(1.0)
    elif sys.argv[2] == "pipe":
        while True:  # with nobody at its other end
            print("x" * 1000, file=sys.stderr)
    else:
        # As a compiler does: no instruction of Python runs, and no signal wakes it.
        mutex = ctypes.create_string_buffer(128)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
print("left in peace")
"""


@pytest.mark.parametrize(
    ("number", "where", "code"),
    [
        (signal.SIGTERM, "python", 143),
        (signal.SIGTERM, "c", 143),
        (signal.SIGINT, "c", 130),
        (signal.SIGTERM, "extended", 0),
        (signal.SIGTERM, "asked early", 0),
    ],
)
def test_whoever_reaches_no_safe_point_is_ended(number: signal.Signals, where: str, code: int):
    command = [sys.executable, "-c", STUCK, number.name, where, preemption.__file__]
    began = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert time.monotonic() - began < 40
    assert ended.returncode == code, ended.stderr
    if code:
        assert f"{number.name}: no safe point was reached in time" in ended.stderr
    else:
        assert ended.stdout == "left in peace\n"


def test_a_pipe_that_nobody_reads_keeps_no_process():
    command = [sys.executable, "-c", STUCK, "SIGTERM", "pipe", preemption.__file__]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=50) == 143
