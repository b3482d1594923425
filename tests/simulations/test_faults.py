"""Federations in which something goes wrong on purpose: they go on, and pay for what they did and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from client.budget import look_up
from client.home import Home, load_images
from client.ledger import Entry, read_ledger
from client.policy import load
from common.config import Config
from common.config_text import build_config
from common.crypto import load_key
from common.errors import ConfigError
from common.messages import Kind
from server.app import Job
from server.records import RoundRecord, read_records
from server.run_folder import open_run
from simulations.engines import run_job
from simulations.faults import EARLIER_RUN, missing_sites
from simulations.hospitals import build_hospitals, draw_federation, site_name

TINY = {
    "image.size": 28,
    "privacy.batch_patients": 8,
    "privacy.min_patients": 10,
    "warmup.steps": 4,
    "warmup.batch_size": 16,
    "model.name": "mlp",
    "model.generator_width": 8,
    "model.discriminator_width": 8,
    "train.steps_per_round": 1,
    "train.d_steps_per_g_step": 1,
    "train.generator_batch": 4,
    "federation.rounds": 6,
    "simulation.sites": 4,
    "simulation.partition": "iid",
    "simulation.holdout": 0.0,
    "performance.threads": 1,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 people with one image each, 40 of class a."""
    path = tmp_path_factory.mktemp("faults") / "digits.npz"
    images = np.random.default_rng(0).integers(0, 255, (60, 28, 28)).astype(np.uint8)
    labels = np.array(["a", "a", "b"])[np.arange(60) % 3]
    np.savez(path, images=images, labels=labels, patient_id=np.array([f"p{number:02d}" for number in range(60)]))
    return path


def _run(out: Path, digits: Path, **changes: object) -> tuple[Config, list[RoundRecord]]:
    federation = draw_federation(build_config({}, {**TINY, "simulation.data": str(digits), **changes}))
    for _ in build_hospitals(federation, out):
        pass
    folder = open_run(out, federation.config, resume=False)
    run_job(Job(federation.config, folder))
    return federation.config, read_records(folder.metrics)


def _home(out: Path, index: int) -> Home:
    return Home(out / "hospitals" / site_name(index))


def _ledger(out: Path, index: int) -> tuple[Entry, ...]:
    home = _home(out, index)
    return read_ledger(home.ledger, load_key(home.key).verify_key).entries


def _charged_rounds(out: Path, index: int) -> set[int]:
    return {entry.request.round for entry in _ledger(out, index) if entry.request.kind is not Kind.WARMUP}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"train.algorithm": "secure-sum"}], ids=["local", "secure-sum"])
def test_missing_sites_cost_their_contribution_only(tmp_path: Path, digits: Path, changes: dict[str, object]) -> None:
    config, records = _run(tmp_path, digits, **{"simulation.missing_share": 0.2, **changes})
    names = {site_name(index) for index in range(4)}
    assert [record.round for record in records] == list(range(7))
    assert records[0].sites.keys() == names  # the warm-up
    away = {number: {site_name(index) for index in missing_sites(config, number)} for number in range(1, 7)}
    assert 0 < sum(map(len, away.values())) < 24
    for record in records[1:]:
        assert record.refused == dict.fromkeys(sorted(away[record.round]), "unreachable")
        assert record.sites.keys() == names - away[record.round]
    for index in range(4):
        there = {number for number, missing in away.items() if site_name(index) not in missing}
        assert _charged_rounds(tmp_path, index) == there


def test_who_is_missing_follows_from_seed_and_round() -> None:
    changes = {"simulation.sites": 40, "simulation.missing_share": 0.2}
    config, other = (build_config({}, {**changes, "federation.seed": seed}) for seed in (3, 4))
    per_round = [missing_sites(config, number) for number in range(1, 101)]
    assert per_round == [missing_sites(config, number) for number in range(1, 101)]
    assert per_round != [missing_sites(other, number) for number in range(1, 101)]
    assert len(set(per_round)) > 90
    assert 800 - 4 * 25.3 < sum(map(len, per_round)) < 800 + 4 * 25.3  # a binomial of 4000 draws, four deviations


def test_as_many_sites_stay_as_a_round_needs() -> None:
    changes = {"simulation.sites": 5, "simulation.missing_share": 0.999, "federation.min_sites": 2}
    config = build_config({}, changes)
    assert {len(missing_sites(config, number)) for number in range(1, 50)} == {3}


@pytest.mark.slow
def test_poor_site_stops_by_itself_and_the_run_goes_on(tmp_path: Path, digits: Path) -> None:
    config, records = _run(tmp_path, digits, **{"simulation.poor_site_budget": 0.1})
    poor = site_name(0)
    joined = [poor in record.sites for record in records]
    assert joined[0] is False  # the warm-up costs more than is left
    assert joined[1]  # a round does not
    assert joined[1:] == sorted(joined[1:], reverse=True)
    assert joined[-1] is False
    assert {record.refused.get(poor) for record in records} == {None, "over-budget"}
    assert all(record.sites.keys() >= {site_name(1), site_name(2), site_name(3)} for record in records)
    first, *own = _ledger(tmp_path, 0)
    assert first.request.run_id == EARLIER_RUN
    assert len(own) == sum(joined)
    budget = look_up(load(_home(tmp_path, 0).policy), [first, *own])
    assert budget.spent <= config.privacy.epsilon
    assert 0.9 * 0.99 <= budget.runs[0].epsilon / config.privacy.epsilon <= 0.9


@pytest.mark.slow
def test_first_site_has_one_class_and_its_size(tmp_path: Path, digits: Path) -> None:
    config, records = _run(tmp_path, digits, **{"simulation.one_class_site": True, "federation.rounds": 1})
    sites = [load_images(_home(tmp_path, index), config.image.classes, 28) for index in range(4)]
    assert [site.number_of_patients for site in sites] == [15] * 4
    assert set(sites[0].labels) == {config.image.classes.index("a")}
    assert all(set(site.labels) == {0, 1} for site in sites[1:])
    assert len(records[1].sites) == 4


def test_a_class_smaller_than_the_site_is_refused(digits: Path) -> None:
    changes = {"simulation.data": str(digits), "simulation.sites": 1, "simulation.one_class_site": True}
    with pytest.raises(ConfigError, match=r"60 patients of one class.*has 40\. Raise simulation\.sites"):
        draw_federation(build_config({}, {**TINY, **changes}))


def test_no_more_patients_than_wanted_and_the_same_held_out(digits: Path) -> None:
    changes = {**TINY, "simulation.data": str(digits), "simulation.sites": 2, "simulation.holdout": 0.2}
    whole, few = (draw_federation(build_config({}, {**changes, "simulation.max_patients": most})) for most in (0, 20))
    assert sum(len(site.records) for site in whole.sites) == 48
    assert [len(site.records) for site in few.sites] == [10, 10]
    assert few.held_out == whole.held_out


def test_faults_do_not_change_the_digest() -> None:
    faults = {"simulation.missing_share": 0.2, "simulation.poor_site_budget": 0.1, "simulation.one_class_site": True}
    assert build_config({}, faults).digest() == build_config({}).digest()
