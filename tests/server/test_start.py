"""The generator that a run starts from: read back as written, and only if it fits the run."""

from pathlib import Path

import numpy as np
import pytest

from common.artefact import save_generator
from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError, WireError
from server.rounds import initial_pair
from server.run_folder import RunFolder
from server.start import has_start, load_start, read_start, write_start
from tests.function_sites import SMALL_RUN


def make_config(**changes: object) -> Config:
    return build_config({}, {**SMALL_RUN, **changes})


def put(tmp_path: Path) -> RunFolder:
    write_start(tmp_path, initial_pair(make_config(**{"federation.seed": 7})).generator, make_config())
    return RunFolder(tmp_path, "run-1")


def test_round_trip(tmp_path: Path) -> None:
    assert not has_start(tmp_path)
    assert read_start(RunFolder(tmp_path, "run-1"), make_config()) is None
    folder = put(tmp_path)
    assert has_start(tmp_path)
    wanted = dict(initial_pair(make_config(**{"federation.seed": 7})).generator.named_parameters())
    arrays = read_start(folder, make_config())
    assert arrays is not None
    assert arrays.keys() == {f"generator.{name}" for name in wanted}
    assert all(np.array_equal(arrays[f"generator.{name}"], p.detach().numpy()) for name, p in wanted.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"model.name": "dcgan"},
        {"model.generator_width": 16},
        {"image.size": 32},
        {"image.channels": 3},
        {"image.classes": ("a", "b", "c")},
    ],
)
def test_what_does_not_fit_the_run_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Remove the folder"):
        read_start(put(tmp_path), make_config(**changes))


def test_what_learned_from_patients_is_no_start(tmp_path: Path) -> None:
    config = make_config()
    save_generator(tmp_path, initial_pair(config).generator, config, "run-1", 3, {"st-mary": 8.0})
    with pytest.raises(ConfigError, match="with the patients of st-mary"):
        load_start(tmp_path, config)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path)
    path = tmp_path / "start" / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(WireError):
        read_start(folder, make_config())
