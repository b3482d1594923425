from pathlib import Path

import pytest
from pydantic import ValidationError

from client.home import Home, create_home
from client.intake import IntakeRules
from client.policy import Policy
from client.site_config import SiteConfig, read_site_config
from common.errors import ConfigError


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("frame = 2", "intake.frame"),
        ("frames = 1", "n >= 2"),
        ('frames = "last"', "intake.frames"),
        ("frames = 2.0", "whole number"),
        ("frames = true", "whole number"),
        ("window = -1", "number of a window"),
        ('window = "first"', "intake.window"),
        ('ct_window = "liver"', "lung"),
        ("ct_window = [40, 0]", "width"),
        ("percentiles = [50, 50]", "low < high"),
        ("percentiles = [-1, 99]", "low < high"),
        ("percentiles = [nan, 99]", "intake.percentiles"),
        ("workers = 0", "intake.workers"),
        ('workers = "2"', "intake.workers"),
        ("decode_seconds = 0", "intake.decode_seconds"),
        ("max_file_mb = 5000", "intake.max_file_mb"),
        ("max_frames = 0", "intake.max_frames"),
    ],
)
def test_strict(tmp_path: Path, table: str, says: str) -> None:
    (tmp_path / "site.toml").write_text(f'data = "images"\n[intake]\n{table}\n')
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        read_site_config(Home(tmp_path))


def test_site_toml_holds_the_rules(tmp_path: Path) -> None:
    table = 'frames = 4\nwindow = "percentile"\nct_window = [40, 400]\npercentiles = [0, 100]\nworkers = 2\n'
    (tmp_path / "site.toml").write_text(f'data = "images"\n[intake]\n{table}')
    rules = read_site_config(Home(tmp_path)).intake
    assert rules == IntakeRules(frames=4, window="percentile", ct_window=(40, 400), percentiles=(0, 100), workers=2)
    assert rules.hounsfield_window() == (40, 400)
    assert rules.max_bytes == 256 * 1024**2


def test_middle_all_nth() -> None:
    assert [IntakeRules().chosen(count)[0] for count in (1, 2, 3, 10)] == [0, 1, 1, 5]
    assert len(IntakeRules().chosen(10)) == 1
    assert IntakeRules(frames="all").chosen(3) == range(3)
    assert IntakeRules(frames=3).chosen(7) == range(0, 7, 3)


def test_rules_are_frozen() -> None:
    with pytest.raises(ValidationError):
        IntakeRules().frames = "all"  # type: ignore[misc]


def test_a_new_home_keeps_the_rules(tmp_path: Path) -> None:
    rules = IntakeRules(frames="all", ct_window="lung", percentiles=(1, 99), workers=3, decode_seconds=7.5)
    policy = Policy(site="north", declared_patients=40, max_epsilon=10, delta=1e-5)
    home = create_home(tmp_path / "home", SiteConfig(data="images", intake=rules), policy)
    assert read_site_config(home).intake == rules
    assert (
        "[intake]" not in (create_home(tmp_path / "b", SiteConfig(data="x"), policy).folder / "site.toml").read_text()
    )
