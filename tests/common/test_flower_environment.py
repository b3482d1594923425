"""The environment of Flower's processes."""

from pathlib import Path

import pytest

from common.flower_environment import flower_environment


def test_switches_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    made = flower_environment(Path("/srv/home"))
    assert (made["FLWR_TELEMETRY_ENABLED"], made["FLWR_INTERNAL_GRPC_CONTROL_API"]) == ("0", "0")
    assert (made["FLWR_DISABLE_UPDATE_CHECK"], made["FLWR_HOME"]) == ("1", "/srv/home/flower")


@pytest.mark.parametrize(("before", "after"), [("", ""), ("intra.example", "intra.example,")])
def test_loopback_goes_direct(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", before)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    made = flower_environment(Path("/srv/home"))
    assert made["NO_PROXY"] == made["no_proxy"] == f"{after}127.0.0.1,localhost"
    assert made["HTTPS_PROXY"] == "http://proxy.example:3128"
