"""Both engines run the same apps over the same hospitals, and the same seed gives the same generator."""

from pathlib import Path

import pytest

from tests.e2e.conftest import simulate

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("finished_run")]


def test_flower_engine_gives_the_same_generator(finished_run: Path, small_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = simulate("--config", small_config, "--engine", "flower", "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "generator.safetensors").read_bytes() == (finished_run / "generator.safetensors").read_bytes()
    assert "Deprecat" not in done.stderr


def test_flower_engine_without_ray_says_what_to_install(small_config: Path, tmp_path: Path) -> None:
    # a package named ray that cannot be imported stands first on the path
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('not installed')")
    out = tmp_path / "run"
    done = simulate("--config", small_config, "--engine", "flower", "--out", out, path=str(tmp_path))
    assert done.returncode == 9, done.stderr
    assert "pip install 'fedmedgan[ray]'" in done.stderr
