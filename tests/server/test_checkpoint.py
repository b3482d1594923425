import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from common.errors import ResumeError, StorageError
from server.aggregation import OptimizerState
from server.checkpoint import State, WarmupRelease, load_latest, save, stepped_over


def _state(number: int) -> State:
    arrays = {"generator.w": np.arange(6, dtype=np.float32).reshape(2, 3) + number}
    moments = OptimizerState({"generator.w": np.ones((2, 3))}, {"generator.w": np.full((2, 3), 2.0)})
    return State("run", "digest", number, arrays, arrays, moments, 5, 0.7, 12)


def test_round_trip_keeps_dtypes_and_scalars(tmp_path) -> None:
    save(tmp_path, _state(4))
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.round, loaded.run_id, loaded.d_steps_per_g_step, loaded.fake_accuracy) == (4, "run", 5, 0.7)
    assert loaded.g_steps_on_rung == 12
    assert (loaded.weights["generator.w"] == _state(4).weights["generator.w"]).all()
    assert loaded.optimizer.second["generator.w"].dtype == np.float64


def test_releases_of_the_warm_up_are_kept(tmp_path) -> None:
    releases = (
        WarmupRelease("public", 1.5, {"sum": np.arange(6.0).reshape(2, 3)}),
        WarmupRelease("means", 2.5, {"sum": np.ones((2, 4)), "lens.scale": np.full(3, 7, np.float32)}),
    )
    save(tmp_path, replace(_state(1), warmup=releases))
    loaded = load_latest(tmp_path)
    assert [(release.look, release.noise_std) for release in loaded.warmup] == [("public", 1.5), ("means", 2.5)]
    for found, wanted in zip(loaded.warmup, releases, strict=True):
        assert found.arrays.keys() == wanted.arrays.keys()
        assert all(found.arrays[name].tobytes() == wanted.arrays[name].tobytes() for name in wanted.arrays)


def test_a_checkpoint_of_another_version_says_what_to_do(tmp_path) -> None:
    save(tmp_path, _state(1))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes().replace(b'\\"version\\": 2', b'\\"version\\": 1'))
    with pytest.raises(ResumeError, match="the release that wrote it"):
        load_latest(tmp_path)


def test_keeps_the_last_three(tmp_path) -> None:
    for number in range(6):
        save(tmp_path, _state(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{n:06d}.safetensors" for n in (3, 4, 5)]
    assert load_latest(tmp_path).round == 5


def test_no_checkpoint_is_none(tmp_path) -> None:
    assert load_latest(tmp_path / "none") is None


DAMAGES = [lambda b: b[:-3], lambda b: b"", lambda b: b"\xff" * 40, lambda b: b[:20]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_loaded(tmp_path, damage) -> None:
    for number in (1, 2, 3):
        save(tmp_path, _state(number))
    assert stepped_over(tmp_path) == []
    for number in (2, 3):
        path = tmp_path / f"round-{number:06d}.safetensors"
        path.write_bytes(damage(path.read_bytes()))
    assert load_latest(tmp_path).round == 1
    assert [line.split(":")[0] for line in stepped_over(tmp_path)] == [
        "round-000003.safetensors is damaged",
        "round-000002.safetensors is damaged",
    ]
    save(tmp_path, _state(2))
    assert load_latest(tmp_path).round == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_it_says_what_to_do(tmp_path, damage) -> None:
    save(tmp_path, _state(1))
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageError, match="Restore one from a backup, or start a new run"):
        load_latest(tmp_path)


def test_one_that_cannot_be_read_is_not_stepped_over(tmp_path) -> None:
    save(tmp_path, _state(1))
    (tmp_path / "round-000002.safetensors").mkdir()
    with pytest.raises(StorageError, match=r"Could not read .*round-000002"):
        load_latest(tmp_path)


_FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from common.errors import StorageError
from server.checkpoint import State, load_latest, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
small, large = {"w": np.zeros(1, np.float32)}, {"w": np.zeros(100_000, np.float32)}
save(folder, State("run", "digest", 1, small, small))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(folder, State("run", "digest", 2, large, large))
except StorageError as error:
    print(error)
print(load_latest(folder).round)
"""


def test_disk_full_while_saving_keeps_the_last(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    message, number = done.stdout.strip().rsplit("\n", 1)
    assert "Could not write round-000002.safetensors" in message
    assert number == "1"
    assert resource.RLIMIT_FSIZE
