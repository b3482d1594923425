"""What of Flower's log a run's own process writes, and where."""

import logging
import sys

import pytest

from common.errors import FederationError
from server.run_process import _brief, _log_apart


def _record(error: Exception | None, text: str = "%s raised an exception") -> logging.LogRecord:
    info = None if error is None else (type(error), error, None)
    return logging.LogRecord("flwr", logging.ERROR, "", 0, text, ("ServerApp",) if "%s" in text else (), info)


def test_an_error_that_a_person_can_mend_is_its_message() -> None:
    record = _record(FederationError("Start the sites, then resume."))
    assert _brief(record)
    assert (record.getMessage(), record.exc_info) == ("Start the sites, then resume.", None)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    record = _record(KeyError("x"))
    assert _brief(record)
    assert record.exc_info is not None


def test_empty_lines_are_dropped() -> None:
    assert not _brief(_record(None, ""))


def test_flowers_words_are_not_mirrored(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever mirrors sys.stderr and sys.stdout to the follower does not see them; the executor's log does."""
    flower, seen = logging.getLogger("flwr"), []
    before = (flower.handlers, flower.propagate, flower.level)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "write", seen.append)
    try:
        _log_apart()
        flower.warning("retrying")
        (handler,) = flower.handlers
        handler.stream.close()
    finally:
        flower.handlers, flower.propagate, flower.level = before
    monkeypatch.undo()
    assert seen == []
    assert "WARNING flwr retrying" in capfd.readouterr().err
