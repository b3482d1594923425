"""The report: one file, escaped, honest."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.artefact import save_generator
from common.config import Config
from common.config_text import build_config
from common.errors import ResumeError
from common.files import write_atomic
from common.models import build
from common.sheets import save_sheet
from server.pace import round_up
from server.records import RoundRecord, SiteRelease, write_records
from server.report import _settings, attack_bounds, write_report
from server.results import SIMULATED_SECRETS, privacy_card, write_class_sheets
from server.run_folder import open_run

HOSTILE = "<script>alert(1)</script> $\\frac{a$ \u533b\u9662 _x"


def _records(sites: Sequence[str], rounds: int) -> list[RoundRecord]:
    return [
        RoundRecord(
            number,
            {name: SiteRelease(300, 1.5, 0.2, 12, 5.0 + number, 10.0, "ab") for name in sites},
            {"absent": "over-budget"} if number == 2 else {},
            0.75 if number else None,
            4 if number else None,
            0.5,
            2.5,
            1000,
        )
        for number in range(rounds + 1)
    ]


def _run(
    path: Path, records: list[RoundRecord], classes: tuple[str, ...] = ("clear", "mass"), refinements: int = 0
) -> Config:
    model = {"model.name": "mlp", "model.latent_dim": 3, "model.generator_width": 8, "model.discriminator_width": 8}
    changes = {"image.classes": classes, "image.size": 28, "warmup.refinements": refinements}
    config = build_config({}, changes | model)
    folder = open_run(path, config, resume=False)
    generator = build(config.model, config.image, len(classes), torch.Generator().manual_seed(0)).generator
    for record in records:
        save_sheet(folder.samples / f"round-{record.round:04d}.png", generator, config)
    write_class_sheets(folder.samples, classes)
    write_records(folder.metrics, records)
    save_generator(path, generator, config, folder.run_id, max(0, len(records) - 1), {})
    card = privacy_card(config, records, SIMULATED_SECRETS)
    write_atomic(path / "privacy.json", json.dumps(card).encode())
    return config


class _Tags(HTMLParser):
    """Collects tags, what they refer to, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parsed(path: Path) -> _Tags:
    tags = _Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    return tags


def _words(path: Path) -> str:
    return " ".join(" ".join(_parsed(path).text).split())


def test_report_self_contained(tmp_path: Path) -> None:
    _run(tmp_path, _records(["a", "b"], 3))
    report = _parsed(write_report(tmp_path))
    assert not {"script", "link", "iframe", "object", "form"} & set(report.tags)
    assert report.tags.count("svg") == 4
    assert report.tags.count("img") == 3
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in report.links)
    style = (tmp_path / "report.html").read_text()
    assert "@import" not in style
    assert not re.findall(r"url\((?!#)", style)


def test_report_escaped(tmp_path: Path) -> None:
    records = _records([HOSTILE, "b"], 2)
    records[1] = RoundRecord(1, records[1].sites, {HOSTILE: HOSTILE}, 0.5, 4, 1.0, 1.0, 1)
    _run(tmp_path, records, (HOSTILE, "other"))
    evaluation = {"tstr_auc": None, "tstr_accuracy": 0.5, "synthetic_images": 10, "held_out_patients": 1}
    evaluation |= {"held_out_images": 1, "repeats": 1, "note": HOSTILE}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    report = _parsed(write_report(tmp_path))
    assert "script" not in report.tags
    assert sum(HOSTILE in text for text in report.text) >= 5


def test_report_says_what_was_spent_and_what_it_means(tmp_path: Path) -> None:
    _run(tmp_path, _records(["a", "b"], 3))
    words = _words(write_report(tmp_path))
    assert "2 sites trained one generator of grey images of 28 x 28 pixels in 2 classes (clear, mass)" in words
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("channels = 1", "channels = 3"))
    assert "one generator of colour images of 28 x 28 pixels" in _words(write_report(tmp_path))
    assert "(8.00, 1e-05)-differentially private" in words
    assert "This was a simulation." in words
    assert "At even odds, at most 99.97 % of such guesses can be right" in words
    assert "absent over-budget 1 2" in words
    assert "[federation]" in words
    assert "generator.safetensors" in words
    assert "Test of the generator" not in words


def test_report_tells_the_warm_up_from_training(tmp_path: Path) -> None:
    _run(tmp_path / "plain", _records(["a"], 3))
    assert "(clear, mass): a warm-up, then 3 of 8 rounds." in _words(write_report(tmp_path / "plain"))
    _run(tmp_path / "refined", _records(["a"], 3), refinements=2)
    words = _words(write_report(tmp_path / "refined"))
    assert "(clear, mass): a warm-up of 3 of 3 releases, then 1 of 6 rounds." in words
    assert "Rounds 0 to 2 are the warm-up." in words
    _run(tmp_path / "begun", _records(["a"], 1), refinements=2)
    words = _words(write_report(tmp_path / "begun"))
    assert "a warm-up of 2 of 3 releases, then 0 of 6 rounds." in words
    assert "Change of the global weights" not in words  # what stands there of the warm-up is the loss of a fit


def test_report_names_classes_that_drowned(tmp_path: Path) -> None:
    first, *later = _records(["a"], 2)
    _run(tmp_path / "drowned", [replace(first, unseen=("mass",)), *later])
    assert "Not learned from any patient in the warm-up: mass." in _words(write_report(tmp_path / "drowned"))
    _run(tmp_path / "lost", [replace(first, unseen=("mass",)), replace(later[0], lost=True)], refinements=1)
    assert "Not learned from any patient in the warm-up: mass." in _words(write_report(tmp_path / "lost"))
    _run(tmp_path / "clear", [first, *later])
    assert "Not learned" not in _words(write_report(tmp_path / "clear"))


def test_report_shows_the_evaluation(tmp_path: Path) -> None:
    _run(tmp_path, _records(["a"], 1))
    evaluation = {"tstr_auc": 0.8125, "tstr_accuracy": 0.75, "synthetic_images": 4000, "held_out_patients": 200}
    evaluation |= {"held_out_images": 240, "repeats": 2, "note": "Computed in the simulator."}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    words = _words(write_report(tmp_path))
    for part in ("Computed in the simulator.", "75 %", "0.812", "240 of 200 patients"):
        assert part in words


@pytest.mark.parametrize(("sites", "rounds"), [(0, -1), (0, 2), (1, 0), (6, 1), (7, 2), (40, 1)])
def test_report_of_any_number_of_sites_and_rounds(tmp_path: Path, sites: int, rounds: int) -> None:
    _run(tmp_path, _records([f"site-{number:02d}" for number in range(sites)], rounds))
    words = _words(write_report(tmp_path))
    assert ("No site released anything." in words) == (sites == 0)
    assert ("No round is finished." in words) == (rounds < 0)


def test_report_is_the_same_again(tmp_path: Path) -> None:
    _run(tmp_path, _records(["a", "b"], 2))
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_report_needs_a_finished_run(tmp_path: Path) -> None:
    _run(tmp_path, _records(["a"], 1))
    (tmp_path / "privacy.json").unlink()
    with pytest.raises(ResumeError, match=r"privacy\.json does not read"):
        write_report(tmp_path)


def test_settings_of_the_simulator_stand_in_a_simulation_alone() -> None:
    config = build_config({}, {"image.classes": ("a",)})
    told, hidden = (dict(_settings(config, simulated)) for simulated in (True, False))
    assert told.keys() - hidden.keys() == {"simulation", "run"}
    assert "engine" in dict(told["performance"])
    assert "engine" not in dict(hidden["performance"])


def test_report_refuses_a_card_that_is_none(tmp_path: Path) -> None:
    _run(tmp_path, [])
    for content in ("", "[]", "{}", '{"epsilon_max": 1.0}', '{"epsilon_max": "much"}', "\x00"):
        (tmp_path / "privacy.json").write_text(content)
        with pytest.raises(ResumeError, match=r"privacy\.json"):
            write_report(tmp_path)


def test_report_shows_the_last_sheet(tmp_path: Path) -> None:
    _run(tmp_path, _records(["a"], 2))
    Image.fromarray(np.zeros((264, 1100), np.uint8)).save(tmp_path / "samples" / "round-0010.png")
    words = _words(write_report(tmp_path))
    assert "after round 10" in words
    assert "Rows from the top:" in words  # the names in the picture are small on a telephone


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (7.58, "7.58"), (7.5801, "7.59"), (9.9999, "10.00"), (1e300, "1e+300")]
)
def test_round_up(value: float, text: str) -> None:
    assert round_up(value) == text


def test_attack_bounds_are_those_of_randomised_response() -> None:
    # Randomised response with p = e/(1+e) is (1, 0)-private and reaches the first bound exactly.
    right, found = attack_bounds(1.0, 0.0)
    assert right == pytest.approx(np.e / (1 + np.e))
    assert found == pytest.approx(0.001 * np.e)
    assert attack_bounds(0.0, 0.0) == pytest.approx((0.5, 0.001))
    assert attack_bounds(10.0, 1e-5)[1] == pytest.approx(1 - (0.999 - 1e-5) * np.exp(-10))
    assert attack_bounds(1e4, 1e-5) == pytest.approx((1.0, 1.0))


def test_curves_of_a_long_run_have_few_points(tmp_path: Path) -> None:
    """The report of thousands of rounds is no larger than that of hundreds, and ends with the last round."""
    sizes: list[int] = []
    for rounds in (300, 3000):
        _run(tmp_path / str(rounds), [])
        write_records(tmp_path / str(rounds) / "metrics.jsonl", _records(["a", "b"], rounds))
        sizes.append(len(write_report(tmp_path / str(rounds)).read_bytes()))
    assert sizes[1] < 2 * sizes[0]  # ten times, with every round in it
