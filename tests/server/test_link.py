"""Whom the link admits before it knows its sites. All else of it runs in tests/e2e/test_link.py."""

import asyncio
import logging
import threading
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from flwr.server.superlink.linkstate import LinkStateFactory

from common.errors import FederationError
from server import link
from server.consortium import Consortium


@pytest.mark.parametrize(
    ("known", "registered", "status"),
    [
        (False, False, HTTPStatus.SERVICE_UNAVAILABLE),
        (False, True, HTTPStatus.UNAUTHORIZED),
        (True, False, HTTPStatus.OK),  # the database of an earlier start knows it
    ],
)
def test_a_site_that_comes_before_it_is_registered_is_asked_to_come_again(
    known: bool, registered: bool, status: HTTPStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not told that it was revoked."""

    def signed_by_a_site(headers: link.Headers, states: LinkStateFactory) -> bool:
        del headers, states
        return known

    monkeypatch.setattr(link, "_signed_by_a_site", signed_by_a_site)
    event = threading.Event()
    if registered:
        event.set()

    async def ask() -> HTTPStatus:
        admit = link.sites_only(cast("LinkStateFactory", None), event)
        return await admit("POST", "/v1/fleet/activate-node", {})

    assert asyncio.run(ask()) is status


class _Looks(threading.Event):
    """A wish to stop that comes after some looks at the home, and keeps how long each was waited for."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left, self.waits = looks, list[float]()

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        self.waits.append(timeout or 0.0)
        return self.left < 0


def _look(looks: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, list[float]]:
    """Look at a home so many times; return whether who is not known is refused by then, and the pauses."""
    monkeypatch.setattr(link, "keep_unheard_runs", lambda *_: None)
    server = cast("link.PromptServer", SimpleNamespace(started=True, heard=0.0))
    registered, stop = threading.Event(), _Looks(looks)
    alive = cast("threading.Thread", SimpleNamespace(is_alive=lambda: True))
    link._watch(Consortium(home), [server], cast("LinkStateFactory", None), registered, alive, stop)
    return registered.is_set(), stop.waits


def test_a_home_that_cannot_be_read_keeps_nobody_waiting_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One damaged record stops every look: who is not known hears so all the same, and the log says why."""
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "st-mary.json").write_text("damaged")

    def cannot(consortium: Consortium) -> None:
        link.enrolled(consortium)

    monkeypatch.setattr(link, "_let_in_and_out", cannot)
    with caplog.at_level(logging.ERROR, "fedmedgan.link"):
        refused, pauses = _look(link.FIRST_LOOKS + 3, tmp_path, monkeypatch)
    assert refused
    assert pauses[-3:] == [link.WATCH_S] * 3  # the log of a home that nobody mends grows no faster than it must
    assert "st-mary.json is not a site's record" in caplog.text
    assert sum("not let in before that is mended" in one.message for one in caplog.records) == 1


def test_a_link_that_is_slow_to_answer_itself_tells_nobody_that_it_is_not_enrolled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [FederationError("The link does not answer.")] * 2

    def soon(_: Consortium) -> None:
        if answers:
            raise answers.pop()

    monkeypatch.setattr(link, "_let_in_and_out", soon)
    assert not _look(2, tmp_path, monkeypatch)[0]
    assert _look(1, tmp_path, monkeypatch)[0]
