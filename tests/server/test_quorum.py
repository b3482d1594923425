"""Nobody is asked, and charged, for a round that too few sites can answer."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from common.config import Config
from common.config_text import build_config
from common.errors import FederationError, PolicyRefusal, RefusalCode
from common.messages import Request, Scalar
from server import app
from server.checkpoint import load_latest
from server.handshake import is_refused
from server.now import failed_line
from server.records import Failed, RoundRecord, Waiting
from tests.function_sites import SMALL_RUN, follow_sites

TOGETHER = {"train.algorithm": "secure-sum", "train.steps_per_round": 1, "privacy.batch_patients": 8}
OUT: Mapping[str, Scalar] = {"verdict": "over-budget", "rounds_allowed": 0}
SPENT: Mapping[str, Scalar] = {"verdict": "over-budget", "rounds_allowed": 2}
Site = Callable[[Request], RefusalCode | None]


def _config(**changes: object) -> Config:
    few = {"federation.rounds": 4, "federation.min_sites": 2, "federation.connect_timeout_s": 0.3}
    return build_config({}, {**SMALL_RUN, **few, **changes})


def _release(index: int, request: Request, _: object) -> tuple[Mapping[str, Scalar], Mapping[str, np.ndarray]]:
    fields: dict[str, Scalar] = {"epsilon_spent": 1.0, "epsilon_allowed": 10.0}
    if request.kind.value == "gradient":
        size = sum(array.size for array in request.arrays.values())
        return fields, {"gradient": np.zeros(size, np.int32)}
    return fields, dict(request.arrays)


def _note(asked: list[int], refuse: Mapping[int, RefusalCode] | None = None) -> Site:
    def answer(request: Request) -> RefusalCode | None:
        asked.append(request.round)
        return (refuse or {}).get(request.round)

    return answer


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RETRY_AFTER_S", 0.0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("algorithm", ["local", "secure-sum"])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_nobody_pays_for_a_round_that_cannot_be(tmp_path: Path, algorithm: str, signed: bool, warmup: float) -> None:
    """Two of three sites say in the handshake that they will not join, and two are needed."""
    asked: list[int] = []
    config = _config(**(TOGETHER if algorithm == "secure-sum" else {}), **{"warmup.share": warmup})
    told = follow_sites(
        tmp_path, config, [_note(asked)] * 3, _release, signed=signed, says=lambda index: OUT if index else {}
    )
    with pytest.raises(PolicyRefusal) as ended:
        list(told)
    said = str(ended.value)
    assert asked == []
    assert said.startswith(
        "Too few sites are left for this run: 1, and at least 2 are needed; for good it is refused by site-1: "
        "over-budget, site-2: over-budget. over-budget: the site's budget does not pay for it; propose less"
    )
    assert "Mend the sites" not in said
    assert is_refused(said)
    assert (tmp_path / "run" / "handshake.json").exists()
    assert not (tmp_path / "run" / "cohort.json").exists()  # so that a resumed run is not bound to those


def test_with_enough_others_it_begins(tmp_path: Path) -> None:
    asked: list[int] = []
    sites = [_note(asked), _note([]), _note([], dict.fromkeys(range(5), RefusalCode.OVER_BUDGET))]
    events = list(follow_sites(tmp_path, _config(), sites, _release, says=lambda index: OUT if index == 2 else {}))
    assert asked == [1, 2, 3, 4]
    assert not [event for event in events if isinstance(event, Failed)]


@pytest.mark.parametrize("colluding", [0, 1])
def test_a_cohort_counts_by_how_many_may_be_missing(tmp_path: Path, colluding: int) -> None:
    asked: list[int] = []
    config = _config(**TOGETHER, **{"privacy.colluding_sites": colluding})
    sites = [_note(asked), _note([]), _note([], dict.fromkeys(range(5), RefusalCode.OVER_BUDGET))]
    told = follow_sites(tmp_path, config, sites, _release, says=lambda index: OUT if index == 2 else {})
    if colluding:
        list(told)
        assert asked == [1, 2, 3, 4]
    else:
        with pytest.raises(PolicyRefusal, match="at least 3 are needed"):
            list(told)
        assert asked == []


@pytest.mark.parametrize("algorithm", ["local", "secure-sum"])
def test_a_budget_that_ends_in_the_run_ends_it_before_the_others_pay(tmp_path: Path, algorithm: str) -> None:
    asked: list[int] = []
    config = _config(**(TOGETHER if algorithm == "secure-sum" else {}))
    sites = [_note(asked)] * 3
    events = list(follow_sites(tmp_path, config, sites, _release, says=lambda index: SPENT if index else {}))
    assert asked == [1] * 3 + [2] * 3
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed_line(failed) == (
        "round 3 failed, attempt 1 of 1: sites 0 in 2 out (site-1: over-budget, site-2: over-budget), at least 2 "
        "needed; the run ends"
    )
    state = load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.round == 2


def test_a_site_that_missed_rounds_can_still_pay_for_as_many(tmp_path: Path) -> None:
    asked: list[int] = []
    late = _note(asked, {1: RefusalCode.INTERNAL, 2: RefusalCode.INTERNAL})
    config = _config(**{"federation.min_sites": 1, "simulation.sites": 2})
    list(follow_sites(tmp_path, config, [late, _note([])], _release, says=lambda index: SPENT))
    assert asked == [1, 2, 3, 4]


def test_a_site_whose_budget_was_raised_goes_on(tmp_path: Path) -> None:
    asked: list[int] = []

    def says(index: int) -> Mapping[str, Scalar]:
        return SPENT if index and not asked else {}

    events = list(follow_sites(tmp_path, _config(), [_note(asked)] * 3, _release, says=says))
    assert asked == [number for number in (1, 2, 3, 4) for _ in range(3)]
    assert [event.round for event in events if isinstance(event, RoundRecord)] == [0, 1, 2, 3, 4]


def test_refusals_for_good_in_a_round_end_the_run_at_once(tmp_path: Path) -> None:
    asked: list[int] = []
    sites = [_note(asked), *[_note([], {2: RefusalCode.OVER_BUDGET})] * 2]
    events = list(follow_sites(tmp_path, _config(), sites, _release))
    assert asked == [1, 2]
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (failed.attempt, failed.of, failed.needed) == (1, 1, 2)
    assert set(failed.record.sites) == {"site-0"}


def test_what_can_be_mended_leaves_the_run_to_be_resumed(tmp_path: Path) -> None:
    asked: list[int] = []
    sites = [_note(asked), _note([], {2: RefusalCode.POLICY}), _note([], {2: RefusalCode.NO_DATA})]
    with pytest.raises(PolicyRefusal, match=r"Too few sites are left.*the site imports, then `resume`"):
        list(follow_sites(tmp_path, _config(), sites, _release))
    assert asked == [1, 2]


def test_refusals_for_good_in_the_first_round_are_the_runs_error(tmp_path: Path) -> None:
    asked: list[int] = []
    sites = [_note(asked), *[_note([], {0: RefusalCode.OVER_BUDGET})] * 2]
    with pytest.raises(PolicyRefusal, match=r"Too few sites are left.*propose less"):
        list(follow_sites(tmp_path, _config(**{"warmup.share": 0.5}), sites, _warmup_release))
    assert asked == [0]


def _warmup_release(index: int, request: Request, _: object) -> tuple[Mapping[str, Scalar], Mapping[str, np.ndarray]]:
    return {"epsilon_spent": 1.0, "epsilon_allowed": 10.0}, {}


def test_for_sites_that_may_still_come_nobody_pays_while_it_waits(tmp_path: Path) -> None:
    """A third site is expected and not there: with it there would be enough."""
    asked: list[int] = []
    told: Iterator[object] = follow_sites(
        tmp_path, _config(), [_note(asked)] * 2, _release, says=lambda index: OUT if index else {}
    )
    events: list[object] = []
    with pytest.raises(FederationError, match=r"at least 2 sites that join .* got 1 \(site-1: over-budget\).*resume"):
        events.extend(iter(told))
    assert asked == []


def test_what_is_to_be_done_fits_the_codes(tmp_path: Path) -> None:
    sites = [_note([]), _note([], {1: RefusalCode.OVER_BUDGET}), _note([], {1: RefusalCode.INTERNAL})]
    with pytest.raises(FederationError, match=r"over-budget: the site's budget does not pay.*Mend the sites, then"):
        list(follow_sites(tmp_path, _config(), sites, _release))


@pytest.mark.parametrize("signed", [False, True])
def test_a_run_that_all_refuse_ends_before_anything_is_charged(tmp_path: Path, signed: bool) -> None:
    asked: list[int] = []
    codes = ("over-budget", "policy", "no-data")

    def says(index: int) -> Mapping[str, Scalar]:
        return {"verdict": codes[index], "rounds_allowed": 0}

    with pytest.raises(PolicyRefusal) as ended:
        list(follow_sites(tmp_path, _config(), [_note(asked)] * 3, _release, signed=signed, says=says))
    said = "Every site refuses this run for good (site-0: over-budget, site-1: policy, site-2: no-data). "
    assert str(ended.value).startswith(said)
    assert "propose less" in str(ended.value)
    assert "the site imports" in str(ended.value)
    assert asked == []


def _until_two_are_away(tmp_path: Path, config: Config, asked: list[int], away: set[int]) -> Iterator[object]:
    """Yield what happens while the third site has two rounds left, and the relays of the others go after these."""

    def leave(request: Request) -> None:
        asked.append(request.round)
        if request.round == 2:
            away.update({0, 1})

    def says(index: int) -> Mapping[str, Scalar]:
        return SPENT if index == 2 else {}

    spent = _note([], dict.fromkeys((3, 4), RefusalCode.OVER_BUDGET))
    return follow_sites(tmp_path, config, [leave, leave, spent], _release, away=lambda: away, signed=True, says=says)


def test_who_is_away_is_waited_for(tmp_path: Path) -> None:
    """The only site that is here has spent its budget: the run does not end well, and goes on once another is back."""
    asked: list[int] = []
    away: set[int] = set()
    config = _config(**{"federation.min_sites": 1, "federation.connect_timeout_s": 60.0})
    waited = 0
    for event in _until_two_are_away(tmp_path, config, asked, away):
        if isinstance(event, Waiting):
            assert event.missing == ("site-0", "site-1")
            waited += 1
            away.clear()
        assert not isinstance(event, Failed)
    assert waited > 0
    assert asked == [1, 1, 2, 2, 3, 3, 4, 4]


def test_who_took_part_and_stays_away_leaves_the_run_to_be_resumed(tmp_path: Path) -> None:
    config = _config(**{"federation.min_sites": 1})
    told = _until_two_are_away(tmp_path, config, [], set())
    with pytest.raises(FederationError, match=r"Not heard: site-0, site-1\. Start or `revoke` them, then resume"):
        list(told)


def test_who_never_took_part_keeps_no_run_from_its_results(tmp_path: Path) -> None:
    asked: list[int] = []
    config = _config(**{"federation.min_sites": 1, "simulation.sites": 3})
    sites = [_note(asked)] * 3
    events = list(follow_sites(tmp_path, config, sites, _release, away=lambda: {1, 2}, signed=True, says=SPENT))
    assert asked == [1, 2]
    assert len([event for event in events if isinstance(event, Failed)]) == 1


def test_refusals_of_all_that_can_be_mended_leave_the_run_to_be_resumed(tmp_path: Path) -> None:
    sites = [_note([], {2: RefusalCode.NO_DATA})] * 3
    with pytest.raises(PolicyRefusal, match=r"Every site refuses.*the site imports, then `resume`"):
        list(follow_sites(tmp_path, _config(), sites, _release, signed=True))
    state = load_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.round == 1


def test_a_refusal_of_the_last_round_counts_until_the_site_says_otherwise(tmp_path: Path) -> None:
    asked: list[int] = []
    refusing: Mapping[str, Scalar] = {"verdict": "policy", "rounds_allowed": 0}

    def says(index: int) -> Mapping[str, Scalar]:
        return SPENT if index == 2 else refusing if index == 1 and 2 in asked else {}

    sites = [_note(asked), _note([], {2: RefusalCode.POLICY}), _note([])]
    with pytest.raises(PolicyRefusal, match="site-1: policy, site-2: over-budget"):
        list(follow_sites(tmp_path, _config(), sites, _release, signed=True, says=says))
    assert asked == [1, 2]


def test_sites_that_are_here_and_cannot_take_part_are_named(tmp_path: Path) -> None:
    behind: Mapping[str, Scalar] = {"verdict": "bad-request", "rounds_allowed": 0}
    told = follow_sites(
        tmp_path, _config(), [_note([])] * 3, _release, signed=True, says=lambda index: behind if index else {}
    )
    with pytest.raises(FederationError, match=r"got 1 \(site-1: it cannot plan this run, site-2.*Mend these"):
        list(told)


def _stopped_after_a_round(tmp_path: Path) -> Config:
    """Leave a run with secure-sum that needs all three of its cohort, and return the configuration to go on with."""
    changes = {**TOGETHER, "privacy.colluding_sites": 0, "warmup.share": 0.0}
    told = follow_sites(tmp_path, _config(**changes), [_note([])] * 3, _release, signed=True)
    for event in told:
        if isinstance(event, RoundRecord) and event.round == 2:
            break
    told.close()  # type: ignore[attr-defined]  # a generator
    return _config(**changes, **{"run.resume": True})


def test_another_number_of_patients_than_the_cohort_was_fixed_to_is_named(tmp_path: Path) -> None:
    config = _stopped_after_a_round(tmp_path)
    told = follow_sites(
        tmp_path, config, [_note([])] * 3, _release, signed=True, says=lambda i: {} if i else {"declared_patients": 150}
    )
    with pytest.raises(FederationError, match=r"site-0: declares 150 patients, the run is fixed to its \d+"):
        list(told)


def test_a_revoked_site_of_the_cohort_is_named_at_once(tmp_path: Path) -> None:
    config = _stopped_after_a_round(tmp_path)
    told = follow_sites(tmp_path, config, [_note([])] * 3, _release, signed=True, revoked={0}, away=lambda: {0})
    with pytest.raises(FederationError, match=r"site-0 may no longer take part, and 3 of 3 are needed\."):
        list(told)


def test_it_waits_and_goes_on_with_a_site_that_was_mended(tmp_path: Path) -> None:
    asked: list[int] = []
    waiting: list[Waiting] = []
    behind: Mapping[str, Scalar] = {"verdict": "bad-request", "rounds_allowed": 0}

    def says(index: int) -> Mapping[str, Scalar]:
        return (OUT, {}, {} if waiting else behind)[index]

    config = _config(**{"federation.connect_timeout_s": 600.0})
    for event in follow_sites(tmp_path, config, [_note(asked)] * 3, _release, says=says):
        if isinstance(event, Waiting):
            assert asked == []
            waiting.append(event)
    assert [(event.here, event.expected, event.needed) for event in waiting] == [(1, 2, 2)]
    assert set(asked) == {1, 2, 3, 4}
