"""What a stop may break off, and what not."""

import signal
import threading

import pytest

from server.app import unbroken


def test_a_stop_waits_until_the_results_are_written() -> None:
    written: list[int] = []

    def write() -> None:
        with unbroken():
            signal.raise_signal(signal.SIGINT)
            written.append(1)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert written == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_stop_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with unbroken():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_results_are_written_in_another_thread_too() -> None:
    """Flower's simulation runs the ServerApp there, where signals cannot be handled."""
    written: list[int] = []

    def write() -> None:
        with unbroken():
            written.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert written == [1]
