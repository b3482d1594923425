"""What a finished run leaves behind."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.artefact import draw, load_generator
from common.config import Config
from common.config_text import build_config
from common.errors import StorageError
from common.sheets import label_width, save_sheet
from common.weights import get_weights
from server.checkpoint import State
from server.pace import round_up
from server.records import RoundRecord, SiteRelease, write_records
from server.report import round_sheets
from server.results import (
    SIMULATED_SECRETS,
    privacy_card,
    thin_out,
    write_class_sheets,
    write_results,
)
from server.rounds import averaged_pair, initial_pair
from server.run_folder import RunFolder, open_run

CLASSES = ("clear", "mass")


def _config() -> Config:
    model = {"model.name": "mlp", "model.latent_dim": 3, "model.generator_width": 8, "model.discriminator_width": 8}
    return build_config({}, {"image.classes": CLASSES, "image.size": 28, "federation.rounds": 2, **model})


def _release(epsilon: float, steps: int = 12, rate: float = 0.1, noise: float = 1.5) -> SiteRelease:
    return SiteRelease(500, noise, rate, steps, epsilon, 10.0, "ab")


def _record(number: int, sites: dict[str, SiteRelease], refused: dict[str, str] | None = None) -> RoundRecord:
    told = 0.9 if number else None
    return RoundRecord(number, sites, refused or {}, told, 4 if number else None, 0.5, 1.25, 1000)


def _records() -> list[RoundRecord]:
    warmup = {name: _release(7.0, 1, 1.0, 0.8) for name in ("a", "b")}
    return [
        _record(0, warmup),
        _record(1, {"a": _release(8.001), "b": _release(7.9)}),
        _record(2, {"a": _release(8.991)}, {"b": "over-budget"}),
    ]


def _finished(path: Path) -> tuple[Config, RunFolder, State]:
    config = _config()
    folder = open_run(path, config, resume=False)
    weights = get_weights(initial_pair(config))
    averaged = {name: array + np.float32(0.01) for name, array in weights.items()}
    state = State(folder.run_id, config.digest(), 2, weights, averaged)
    for number in range(3):
        save_sheet(folder.samples / f"round-{number:04d}.png", averaged_pair(config, state).generator, config)
    write_records(folder.metrics, _records())
    return config, folder, state


def test_write_results_leaves_every_file(tmp_path: Path) -> None:
    config, folder, state = _finished(tmp_path)
    write_results(config, folder, state, _records(), SIMULATED_SECRETS)
    for name in ("generator.safetensors", "generator.json", "privacy.json", "report.html"):
        assert (tmp_path / name).stat().st_size > 0
    assert sorted(path.name for path in folder.samples.glob("class-*")) == ["class-clear.png", "class-mass.png"]


def test_write_results_keeps_the_averaged_generator(tmp_path: Path) -> None:
    config, folder, state = _finished(tmp_path)
    write_results(config, folder, state, _records(), SIMULATED_SECRETS)
    loaded, info = load_generator(tmp_path)
    assert (info.run_id, info.rounds) == (folder.run_id, 2)
    assert info.epsilon_by_site == {"a": 8.991, "b": 7.9}
    labels = torch.arange(2).repeat(3)
    expected = draw(averaged_pair(config, state).generator, labels, 3, torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(draw(loaded, labels, 3, torch.Generator().manual_seed(1)), expected)
    raw = draw(initial_pair(config).generator, labels, 3, torch.Generator().manual_seed(1))
    assert (raw != expected).any()


def test_write_results_can_be_repeated(tmp_path: Path) -> None:
    config, folder, state = _finished(tmp_path)
    write_results(config, folder, state, _records(), SIMULATED_SECRETS)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_results(config, folder, state, _records(), SIMULATED_SECRETS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_privacy_card_states_each_site_with_its_releases() -> None:
    card = privacy_card(_config(), _records(), "operating system")
    assert card["sites"]["a"] == {
        "declared_patients": 500,
        "epsilon_spent": 8.991,
        "epsilon_allowed": 10.0,
        "releases": [
            {"kind": "warm-up", "noise_multiplier": 0.8, "sample_rate": 1.0, "steps": 1, "count": 1},
            {"kind": "train", "noise_multiplier": 1.5, "sample_rate": 0.1, "steps": 12, "count": 2},
        ],
    }
    assert [release["count"] for release in card["sites"]["b"]["releases"]] == [1, 1]
    assert (card["version"], card["unit"], card["delta"], card["randomness"]) == (
        1,
        "patient",
        1e-5,
        "operating system",
    )
    for part in ("Poisson", "clipped", "public constant", "post-processing"):
        assert part in card["mechanism"]["training"]
    assert card["mechanism"]["max_grad_norm"] == 1.0
    for part in ("population", "k sites", "public", "How long", "held-out"):
        assert any(part in item for item in card["not_covered"])


def test_privacy_card_counts_refinements_as_releases_of_the_warm_up() -> None:
    config = build_config(_config().model_dump(), {"warmup.refinements": 1})
    records = [_record(number, {"a": _release(5.0 + number, 1, 1.0, 0.8)}) for number in range(2)]
    card = privacy_card(config, [*records, _record(2, {"a": _release(8.0)})], "")
    assert [(release["kind"], release["count"]) for release in card["sites"]["a"]["releases"]] == [
        ("warm-up", 2),
        ("train", 1),
    ]


def test_privacy_card_worst_site() -> None:
    assert privacy_card(_config(), _records(), "")["epsilon_max"] == 8.991
    assert privacy_card(_config(), _records()[:2], "")["epsilon_max"] == 8.001


def test_privacy_card_failed_rounds_count() -> None:
    """Of round 3 a site's answer came twice and was not kept; that of another to round 2 was kept at last."""
    failed = [_record(3, {"a": _release(9.5)}), _record(3, {"a": _release(9.5)}), _record(2, {"a": _release(8.991)})]
    failed += [_record(3, {"c": _release(2.0)})]
    card = privacy_card(_config(), [*failed, *_records()], "")
    assert card["epsilon_max"] == 9.5
    assert [(release["kind"], release["count"]) for release in card["sites"]["a"]["releases"]] == [
        ("warm-up", 1),
        ("train", 3),
    ]
    assert card["sites"]["c"]["declared_patients"] == 500


@settings(deadline=None, derandomize=True)
@given(st.floats(0.0, 200.0))
def test_privacy_card_rounded_up(epsilon: float) -> None:
    statement = privacy_card(_config(), [_record(1, {"a": _release(epsilon)})], "")["statement"]
    stated = float(statement.split("(")[1].split(",")[0])
    assert epsilon - 1e-8 <= stated <= epsilon + 0.01 + 1e-8


@pytest.mark.parametrize(("colluding", "parts"), [("all", 1), (2, 1), (1, 2), (0, 3)])
def test_privacy_card_assumption_in_the_sentence(colluding: object, parts: int) -> None:
    together = {"train.algorithm": "secure-sum", "train.steps_per_round": 1, "privacy.colluding_sites": colluding}
    config = build_config(_config().model_dump(), {**together, "privacy.batch_patients": 8})
    card = privacy_card(config, _records(), "", {"a": 500, "b": 500, "c": 200})
    shared, statement = card["secure_sum"], card["statement"]
    assert shared["noise_shares"] == parts
    if parts == 1:
        assert "everything that left the site is (9.00, " in statement
        assert shared["epsilon_of_parts_seen"] <= config.privacy.epsilon
        return
    assert "the sum over the sites of what left them is (9.00, " in statement
    assert f"ASSUMING: only the sum over the sites is seen, and at most {colluding} of 3 sites" in statement
    assert shared["epsilon_of_parts_seen"] > 1.3 * config.privacy.epsilon
    assert statement.endswith(f"epsilon is up to {round_up(shared['epsilon_of_parts_seen'])}.")


@pytest.mark.parametrize("records", [[], [_record(0, {}, {"a": "timeout"})]])
def test_privacy_card_of_a_run_without_releases(records: list[RoundRecord]) -> None:
    card = privacy_card(_config(), records, SIMULATED_SECRETS)
    assert card["epsilon_max"] == 0.0
    assert card["statement"] == "No site released anything."
    assert math.isfinite(json.loads(json.dumps(card, allow_nan=False))["delta"])


def test_class_sheets_stack_the_rows_of_one_class(tmp_path: Path) -> None:
    _, folder, _ = _finished(tmp_path)
    write_class_sheets(folder.samples, CLASSES)
    with Image.open(folder.samples / "class-mass.png") as stacked, Image.open(folder.samples / "round-0001.png") as one:
        assert stacked.height == 3 * 66
        assert stacked.width > 8 * 66
        lower = one.crop((one.width - 132, 132, one.width, 264)).reduce(2)
        again = stacked.crop((stacked.width - 66, 66, stacked.width, 132))
        np.testing.assert_array_equal(np.asarray(lower), np.asarray(again))


def test_class_sheets_of_colour_are_in_colour(tmp_path: Path) -> None:
    red = Image.new("RGB", (label_width(CLASSES) + 8 * 132, len(CLASSES) * 132), (200, 0, 0))
    red.save(tmp_path / "round-0001.png")
    write_class_sheets(tmp_path, CLASSES)
    with Image.open(tmp_path / "class-clear.png") as stacked:
        assert stacked.mode == "RGB"
        assert stacked.getpixel((0, 0)) == (255, 255, 255)
        assert stacked.getpixel((stacked.width - 1, 0)) == (200, 0, 0)


def test_class_sheets_have_at_most_twelve_rows(tmp_path: Path) -> None:
    _, folder, _ = _finished(tmp_path)
    content = (folder.samples / "round-0000.png").read_bytes()
    for number in range(40):
        (folder.samples / f"round-{number:04d}.png").write_bytes(content)
    (folder.samples / "round-00x.png").write_bytes(content)
    write_class_sheets(folder.samples, CLASSES)
    with Image.open(folder.samples / "class-clear.png") as stacked:
        assert stacked.height == 12 * 66


def test_class_sheets_without_sheets_are_none(tmp_path: Path) -> None:
    write_class_sheets(tmp_path, CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_class_sheets_name_a_damaged_sheet(tmp_path: Path) -> None:
    (tmp_path / "round-0000.png").write_bytes(b"no image")
    with pytest.raises(StorageError, match=r"round-0000\.png does not read"):
        write_class_sheets(tmp_path, CLASSES)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(2, 20))
def test_thin_out_keeps_first_last_and_order(count: int, most: int) -> None:
    items = [(number, Path(str(number))) for number in range(count)]
    kept = thin_out(items, most)
    assert len(kept) == min(count, most)
    assert (kept[0], kept[-1]) == (items[0], items[-1])
    assert kept == sorted(set(kept))


def test_round_sheets_are_in_the_order_of_rounds(tmp_path: Path) -> None:
    for name in ("round-10000.png", "round-0002.png", "round-0010.png", "class-a.png"):
        (tmp_path / name).touch()
    assert [number for number, _ in round_sheets(tmp_path)] == [2, 10, 10000]
