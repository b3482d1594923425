"""A gallery that nobody picked: ranked, repeatable, refused where nothing ranks."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.artefact import save_generator
from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError
from common.models import build
from simulations.gallery import save_gallery


def make_run(folder: Path, classes: tuple[str, ...]) -> Config:
    config = build_config({"image": {"size": 28, "classes": classes}, "model": {"name": "mlp", "generator_width": 8}})
    generator: nn.Module = build(config.model, config.image, len(classes), torch.Generator().manual_seed(3)).generator
    save_generator(folder, generator, config, "run-1", 1, {"a": 1.0})
    return config


@pytest.mark.slow
def test_same_again(tmp_path: Path) -> None:
    make_run(tmp_path, ("clear", "opacity"))
    digests = set()
    for name in ("one.png", "two.png"):
        save_gallery(tmp_path, tmp_path / name, learned_from=400)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    with Image.open(tmp_path / "one.png") as sheet:
        assert sheet.height == 6 * 132
        pixels = np.asarray(sheet.convert("L"))
    best, worst = pixels[132:264, -132:], pixels[264:396, -132:]
    assert not np.array_equal(best, worst)


def test_one_class_has_no_best(tmp_path: Path) -> None:
    make_run(tmp_path, ("all",))
    with pytest.raises(ConfigError, match="at least 2 classes"):
        save_gallery(tmp_path, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
