"""What a run shows and keeps of its sites before it asks them anything."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.config import Config
from common.config_text import build_config
from common.greeting import Greeting, Verdict
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION
from common.wire import Release
from server.handshake import Handshake, Met, extent, lines, meet, other_proposal, other_protocol
from server.run_folder import RunFolder
from tests.function_sites import SMALL_RUN, greeting

CONFIG: Config = build_config({}, {**SMALL_RUN, "federation.rounds": 100, "warmup.share": 0.5})
ALL = greeting("st-anne", 300, CONFIG)


def said(verdict: Verdict, allowed: int, name: str = "st-mary") -> Greeting:
    return dataclasses.replace(ALL, site=name, declared_patients=40, verdict=verdict, rounds_allowed=allowed)


@pytest.fixture
def met(tmp_path: Path) -> Met:
    return Met(RunFolder(tmp_path, "run"), CONFIG, compact=False)


def news(met: Met, *sites: Greeting, **left_out: str) -> list[Handshake]:
    return list(meet(met, {site.site: site for site in sites}, left_out))


@pytest.mark.parametrize(
    ("verdict", "allowed", "words"),
    [
        (Verdict.OK, 101, "will join 100 of 100 rounds"),
        (Verdict.OVER_BUDGET, 61, "will join 60 of 100 rounds: budget"),
        (Verdict.OVER_BUDGET, 1, "will join the warm-up alone: budget"),
        (Verdict.OVER_BUDGET, 0, "will not join the warm-up: budget"),
        (Verdict.POLICY, 0, "will not join: policy"),
        (Verdict.NO_DATA, 0, "will not join: no images imported for these classes, size and channels"),
        (Verdict.BAD_REQUEST, 0, "will not join: it cannot plan this run"),
        (Verdict.OK, 100_001, "will join 100 of 100 rounds"),
    ],
)
def test_every_verdict_in_words(verdict: Verdict, allowed: int, words: str) -> None:
    assert extent(CONFIG, said(verdict, allowed)) == words


def test_a_run_that_is_a_warm_up_alone() -> None:
    for rounds in (0, 2):
        config = build_config(
            {}, {**SMALL_RUN, "federation.rounds": rounds, "warmup.share": 0.5, "warmup.refinements": 2}
        )
        assert extent(config, said(Verdict.OK, 1 + rounds)) == "will join the warm-up alone"


def test_part_of_the_releases_of_a_warm_up_is_none() -> None:
    config = build_config({}, {**SMALL_RUN, "federation.rounds": 3, "warmup.share": 0.5, "warmup.refinements": 2})
    assert extent(config, said(Verdict.OVER_BUDGET, 2)) == "will not join the warm-up: budget"
    assert extent(config, said(Verdict.OVER_BUDGET, 3)) == "will join the warm-up alone: budget"
    assert extent(config, said(Verdict.OK, 4)) == "will join 3 of 3 rounds"


def test_without_a_warm_up() -> None:
    config = build_config({}, {**SMALL_RUN, "federation.rounds": 100})
    assert extent(config, said(Verdict.OVER_BUDGET, 60)) == "will join 60 of 100 rounds: budget"
    assert extent(config, said(Verdict.OVER_BUDGET, 1)) == "will join 1 of 100 rounds: budget"


def test_a_line_a_site_under_a_heading(met: Met) -> None:
    older = dataclasses.replace(said(Verdict.OVER_BUDGET, 61, "b"), package="0.0.9")
    (event,) = news(met, ALL, older, **{"st-john": "why"})
    assert lines(CONFIG, event) == [
        f"handshake: protocol {PROTOCOL_VERSION}, fedmedgan {PACKAGE_VERSION}, configuration {CONFIG.digest()[:12]}, "
        "run run in the sites' ledgers",
        f"  st-anne  300 patients  fedmedgan {PACKAGE_VERSION}  will join 100 of 100 rounds",
        f"  b        40 patients  fedmedgan 0.0.9, here {PACKAGE_VERSION}  will join 60 of 100 rounds: budget",
        "  st-john  left out: why",
    ]


def test_one_line_within_one_machine() -> None:
    many = {f"hospital-{number}": greeting(f"hospital-{number}", 100, CONFIG) for number in range(1000)}
    many["hospital-7"] = said(Verdict.OVER_BUDGET, 11, "hospital-7")
    told = lines(CONFIG, Handshake(many, {}, first=False, compact=True))
    assert told == ["  999 sites will join 100 of 100 rounds; hospital-7 will join 10 of 100 rounds: budget"]


def test_only_what_is_new_is_said(met: Met) -> None:
    assert [event.first for event in news(met, ALL)] == [True]
    assert news(met, ALL) == []
    assert news(met) == []  # it is away for a while
    (event,) = news(met, ALL, said(Verdict.OK, 101), **{"node 7": "why"})
    assert (set(event.sites), dict(event.left_out), event.first) == ({"st-mary"}, {"node 7": "why"}, False)
    assert news(met, ALL, **{"node 7": "why"}) == []
    (event,) = news(met, said(Verdict.OVER_BUDGET, 61))
    assert set(event.sites) == {"st-mary"}


def test_it_is_kept_in_the_run_folder(met: Met) -> None:
    news(met, ALL, **{"st-mary": "it speaks protocol 1"})
    tree = json.loads((met.folder.path / "handshake.json").read_text())
    head = {"version": 1, "protocol": PROTOCOL_VERSION, "package": PACKAGE_VERSION, "rounds": 101}
    head |= {"run": met.folder.path.name, "run_id": "run"}
    assert tree == head | {
        "config_sha256": CONFIG.digest(),
        "sites": {"st-anne": ALL.as_fields()},
        "left_out": {"st-mary": "it speaks protocol 1"},
    }
    news(met, ALL, said(Verdict.OK, 101))  # st-mary was updated
    tree = json.loads((met.folder.path / "handshake.json").read_text())
    assert (set(tree["sites"]), tree["left_out"]) == ({"st-anne", "st-mary"}, {})


def test_another_protocol_names_both_versions_and_who_is_behind() -> None:
    ours = f"this coordinator protocol {PROTOCOL_VERSION} (fedmedgan {PACKAGE_VERSION})"
    assert other_protocol(Release(1, "")) == f"it speaks protocol 1, {ours}: update the site"
    newer = other_protocol(Release(99, "7.0.0"))
    assert newer == f"it speaks protocol 99 (fedmedgan 7.0.0), {ours}: update this coordinator"


@pytest.mark.parametrize(("theirs", "fix"), [("0.0.1", "update the site"), ("99.0", "update this coordinator")])
def test_another_reading_of_the_proposal_names_both_versions_and_who_is_behind(theirs: str, fix: str) -> None:
    other = dataclasses.replace(ALL, package=theirs, proposal_sha256="")
    assert other_proposal(CONFIG, other) == (
        f"its fedmedgan {theirs} reads the configuration otherwise, this coordinator has fedmedgan {PACKAGE_VERSION}: "
        f"{fix}"
    )
    assert "has no mlp," in str(other_proposal(CONFIG, dataclasses.replace(other, capabilities="local dcgan")))


def test_another_package_that_reads_the_same_is_let_in() -> None:
    assert other_proposal(CONFIG, dataclasses.replace(ALL, package="99.0")) is None


def test_the_same_package_that_reads_otherwise_is_a_fault() -> None:
    told = other_proposal(CONFIG, dataclasses.replace(ALL, proposal_sha256="0" * 64))
    assert str(told).endswith("report it")
