"""Whom the link admits before it knows its sites. All else of it runs in tests/e2e/test_link.py."""

import asyncio
import threading
from http import HTTPStatus
from typing import cast

import pytest
from flwr.server.superlink.linkstate import LinkStateFactory

from server import link


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
