"""Who takes part with secure-sum: fixed once, and kept whatever happens."""

import json
from pathlib import Path

import pytest

from common.config import Config
from common.config_text import build_config
from common.errors import FederationError, ResumeError
from common.plan import plan
from common.secure_sum import Cohort
from server.cohort import cohort_of, fix_cohort, least_sites, taking_part
from server.roster import Member
from server.run_folder import RunFolder
from tests.function_sites import SMALL_RUN, greeting


def make_config(**changes: object) -> Config:
    own = {"train.algorithm": "secure-sum", "train.steps_per_round": 1}
    return build_config({}, {**SMALL_RUN, **own, **changes})


def members(**declared: int) -> dict[str, Member]:
    config = make_config(**{"warmup.share": 0.5})
    return {
        name: Member(name, number, patients, plan(config, patients), greeting(name, patients, config))
        for number, (name, patients) in enumerate(declared.items())
    }


def test_the_first_cohort_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    first = fix_cohort(folder, make_config(), members(a=100, b=200, small=19))
    assert first == {"a": 100, "b": 200}
    assert cohort_of(first) == Cohort(2, 300)
    assert fix_cohort(folder, make_config(), members(a=100, c=500)) == first


def test_with_local_training_there_is_none(tmp_path: Path) -> None:
    config = build_config({}, SMALL_RUN)
    assert fix_cohort(RunFolder(tmp_path, "run"), config, members(a=100)) == {}
    assert list(tmp_path.iterdir()) == []


def test_without_anybody_nothing_is_fixed(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="No site declares"):
        fix_cohort(RunFolder(tmp_path, "run"), make_config(), members(small=19))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", json.dumps({"version": 2, "declared_patients": {}}).encode()]
)
def test_a_file_that_does_not_read_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cohort.json").write_bytes(content)
    with pytest.raises(ResumeError, match=r"cohort\.json"):
        fix_cohort(RunFolder(tmp_path, "run"), make_config(), members(a=100))


def test_only_who_is_in_it_and_declares_the_same_is_asked() -> None:
    config = make_config(**{"warmup.share": 0.5, "privacy.colluding_sites": 1})
    asked = taking_part(config, members(a=100, b=250, new=300), {"a": 100, "b": 200, "gone": 100})
    assert list(asked) == ["a"]
    assert asked["a"].plan == plan(config, 100, Cohort(3, 400))
    assert asked["a"].plan.noise_shares == 2


def test_a_number_of_colluding_sites_is_how_many_may_be_missing() -> None:
    five = dict.fromkeys("abcde", 100)
    assert least_sites(make_config(), five) == 1
    assert least_sites(make_config(**{"federation.min_sites": 2}), five) == 2
    assert [least_sites(make_config(**{"privacy.colluding_sites": t}), five) for t in (0, 1, 4)] == [5, 4, 1]
