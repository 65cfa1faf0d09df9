"""The first signal asks, the second Ctrl-C insists, and everything is as before afterwards."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from bilevel_flax.train.preemption import SignalGuard


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
    with SignalGuard() as guard:
        assert guard.received is None
        os.kill(os.getpid(), number)
        assert guard.received is number


def test_sigterm_may_come_often_and_the_first_signal_counts():
    with SignalGuard() as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert guard.received is signal.SIGTERM


def test_the_second_interrupt_raises():
    with pytest.raises(KeyboardInterrupt), SignalGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.received is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second Ctrl-C did not raise")


def test_a_guard_can_be_entered_again():
    guard = SignalGuard()
    for _ in range(2):
        with guard:
            assert guard.received is None
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_not_asked_for_and_ignored_ones_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalGuard([signal.SIGINT]) as guard:
            assert signal.getsignal(signal.SIGTERM) is before
            os.kill(os.getpid(), signal.SIGINT)
            assert guard.received is None
    finally:
        signal.signal(signal.SIGINT, interrupt)


def test_another_thread_gets_a_guard_that_does_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with SignalGuard() as guard:
            seen.append((guard.received, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, True)]
