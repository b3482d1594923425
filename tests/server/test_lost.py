"""A round that the sites answered before a crash, to another question than the resumed run asks."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from common.config import Config
from common.config_text import build_config
from common.errors import FederationError, RefusalCode
from common.messages import Request, Scalar
from common.seal import request_digest
from server import app, lost
from server.checkpoint import load_latest
from server.display import plain_line
from server.pace import seconds_left
from server.records import Failed, RoundRecord, read_records
from tests.function_sites import SMALL_RUN, follow_sites

Asked = Callable[[Request], RefusalCode | None]


def _config(**changes: object) -> Config:
    few = {"federation.rounds": 4, "federation.min_sites": 2, "simulation.sites": 2}
    return build_config({}, {**SMALL_RUN, **few, **changes})


def _release(index: int, request: Request, _: object) -> tuple[Mapping[str, Scalar], Mapping[str, np.ndarray]]:
    fields = {"epsilon_spent": 1.0, "epsilon_allowed": 10.0, "fake_accuracy": 0.5, "d_steps_per_g_step": 1}
    return fields, {name: array + index for name, array in request.arrays.items()}


def _once_a_round(answered: dict[int, str], asked: list[int]) -> Asked:
    """Make a site that answers one question a round: the same again, another never."""

    def answer(request: Request) -> RefusalCode | None:
        asked.append(request.round)
        before = answered.setdefault(request.round, request_digest(request))
        return None if before == request_digest(request) else RefusalCode.REPLAYED

    return answer


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RETRY_AFTER_S", 0.0)


def test_a_round_that_every_site_answered_to_another_question_is_given_up_at_once(tmp_path: Path) -> None:
    asked: list[int] = []
    sites = [_once_a_round({2: "another"}, asked), _once_a_round({2: "another"}, [])]
    events = list(follow_sites(tmp_path, _config(), sites, _release))
    assert not [event for event in events if isinstance(event, Failed)]
    assert asked == [1, 2, 3, 4]
    records = [event for event in events if isinstance(event, RoundRecord)]
    assert [record.round for record in records if record.lost] == [2]
    assert records == read_records(tmp_path / "run" / "metrics.jsonl")
    assert load_latest(tmp_path / "run" / "checkpoints").round == 4
    assert plain_line(_config(), records[:3]).startswith(
        "round 2/4  given up (site-0: replayed, site-1: replayed): it was answered before, to another question; its "
        "charge is spent, its answers are lost"
    )


def test_a_resumed_run_knows_that_a_round_was_given_up(tmp_path: Path) -> None:
    asked: list[int] = []
    sites = [_once_a_round({2: "another"}, asked), _once_a_round({2: "another"}, [])]
    for event in follow_sites(tmp_path, _config(), sites, _release):
        if isinstance(event, RoundRecord) and event.round == 2:
            break  # as a crash would
    list(follow_sites(tmp_path, _config(**{"run.resume": True}), sites, _release))
    assert asked == [1, 2, 3, 4]
    assert [record.lost for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_with_too_few_others_a_round_is_given_up_too_and_what_they_gave_is_recorded(tmp_path: Path) -> None:
    sites = [_once_a_round({2: "another"}, []), _once_a_round({}, [])]
    events = list(follow_sites(tmp_path, _config(), sites, _release))
    given_up = [event for event in events if isinstance(event, RoundRecord) and event.lost]
    assert [(record.round, set(record.sites)) for record in given_up] == [(2, {"site-1"})]


def test_while_enough_others_may_still_come_a_round_is_tried_again(tmp_path: Path) -> None:
    late = iter([None, RefusalCode.INTERNAL])

    def late_once(request: Request) -> RefusalCode | None:
        return next(late, None) if request.round in (1, 2) else None

    config = _config(**{"federation.min_sites": 1})
    sites = [_once_a_round({2: "another"}, []), late_once]
    events = list(follow_sites(tmp_path, config, sites, _release))
    assert [event.record.round for event in events if isinstance(event, Failed)] == [2]
    assert not [event for event in events if isinstance(event, RoundRecord) and event.lost]


def test_a_site_that_always_says_replayed_does_not_spend_the_budget_of_the_others(tmp_path: Path) -> None:
    asked: list[int] = []
    config = _config(**{"federation.rounds": 20})

    def never(request: Request) -> RefusalCode:
        return RefusalCode.REPLAYED

    with pytest.raises(FederationError, match=r"site-0: replayed.*`revoke`"):
        list(follow_sites(tmp_path, config, [never, _once_a_round({}, asked)], _release))
    assert len(asked) == lost.LOST_IN_A_ROW


def test_a_run_whose_first_round_was_lost_asks_for_a_new_run(tmp_path: Path) -> None:
    config = _config(**{"warmup.share": 0.2})
    sites = [_once_a_round({0: "another"}, []), _once_a_round({0: "another"}, [])]
    with pytest.raises(FederationError, match="start a new run"):
        list(follow_sites(tmp_path, config, sites, _release))


def test_a_round_given_up_says_nothing_of_the_pace(tmp_path: Path) -> None:
    def record(number: int, seconds: float, given_up: bool) -> RoundRecord:
        return RoundRecord(number, {}, {}, None, 1, 0.0, seconds, 0, lost=given_up)

    assert seconds_left([record(1, 10.0, False), record(2, 0.1, True)], 0, 4) == 20.0
