"""Epsilon per site from metrics.jsonl and config.toml alone, by dp-accounting, with none of our code; and what was
received is what the sites' journals say left."""

import json
import tomllib
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld

from client import journal
from client.home import Home
from common.crypto import load_key

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("finished_run")]


def recompute(run: Path) -> dict[str, float]:
    """Compose what every site released, as written round by round."""
    config = tomllib.loads((run / "config.toml").read_text())
    accountants: dict[str, pld.PLDAccountant] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        for site, release in json.loads(line)["sites"].items():
            accountant = accountants.setdefault(
                site, pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
            )
            gaussian = dp_accounting.GaussianDpEvent(release["noise_multiplier"])
            event = dp_accounting.PoissonSampledDpEvent(release["sample_rate"], gaussian)
            accountant.compose(event, release["steps"])
    return {site: accountant.get_epsilon(config["privacy"]["delta"]) for site, accountant in accountants.items()}


def test_every_site_is_within_its_budget(finished_run: Path) -> None:
    stated = json.loads((finished_run / "privacy.json").read_text())
    budget = tomllib.loads((finished_run / "config.toml").read_text())["privacy"]["epsilon"]
    recomputed = recompute(finished_run)
    assert set(recomputed) == set(stated["sites"])
    for site, value in recomputed.items():
        assert value <= budget
        assert value == pytest.approx(stated["sites"][site]["epsilon_spent"], rel=2e-3)
        assert value > 0.9 * budget  # nearly all of it was used, so the bound is not met by standing still


def test_sample_rate_follows_from_public_numbers(finished_run: Path) -> None:
    batch = tomllib.loads((finished_run / "config.toml").read_text())["privacy"]["batch_patients"]
    for line in (finished_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for release in record["sites"].values():
            expected = 1.0 if record["round"] == 0 else min(1.0, batch / release["declared_patients"])
            assert release["sample_rate"] == pytest.approx(expected)


def test_what_was_received_is_what_the_journals_say_left(finished_run: Path) -> None:
    received: dict[str, dict[int, str]] = {}
    for line in (finished_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for site, release in record["sites"].items():
            received.setdefault(site, {})[record["round"]] = release["sha256"]
    for site, digests in received.items():
        home = Home(finished_run / "hospitals" / site)
        entries = journal.entries(home.journal, load_key(home.key).verify_key)
        assert {entry.round: entry.sha256 for entry in entries} == digests
