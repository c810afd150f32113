"""Which signals ask for a stop, and what a second one does."""

import os
import signal

import pytest

from latentjax.training.signals import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers_of_others():
    """What handles them is put back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)],
)
def test_the_first_asks_and_the_second_ends_the_process(number: signal.Signals, status: int, capsys):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with StopRequest() as stop:
        assert not stop.requested and stop.exit_status == 0
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.signal, stop.exit_status) == (True, number, status)
        assert all(signal.getsignal(each) == signal.SIG_DFL for each in SIGNALS)
    assert f"{number.name}: saving and leaving after this step" in capsys.readouterr().err
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_under_nohup_a_closing_terminal_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
