"""A tiny site with forty patients, imported once and copied for each test."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from client.home import Home, SiteConfig, create_home, import_images
from client.policy import Policy
from common.config import Proposal

TREE = {
    "image": {"size": 28, "classes": ("clear", "opacity")},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "batch_patients": 4, "images_per_patient": 2, "min_patients": 10},
    "warmup": {"share": 0.5},
    "model": {"name": "mlp", "latent_dim": 4, "generator_width": 8, "discriminator_width": 8},
    "train": {"steps_per_round": 2, "generator_batch": 4},
    "federation": {"rounds": 3},
}


@pytest.fixture(scope="session")
def tiny_proposal() -> Proposal:
    return Proposal.model_validate(TREE)


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory: pytest.TempPathFactory, tiny_proposal: Proposal) -> Path:
    folder = tmp_path_factory.mktemp("template")
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    names = np.array(tiny_proposal.image.classes)
    np.savez(
        folder / "images.npz",
        images=rng.integers(0, 256, (len(patients), 28, 28)).astype(np.uint8),
        patient_id=np.array([f"p{patient}" for patient in patients]),
        labels=names[patients % 2],
    )
    policy = Policy(site="st-mary", declared_patients=40, max_epsilon=8.0, delta=1e-5, min_patients=10, max_rounds=500)
    home = create_home(folder / "home", SiteConfig(data=str(folder / "images.npz"), label="auto"), policy)
    import_images(home, tiny_proposal.image.classes, 28, 10)
    return home.folder


@pytest.fixture
def tiny_home(tiny_template: Path, tmp_path: Path) -> Home:
    shutil.copytree(tiny_template, tmp_path / "home")
    return Home(tmp_path / "home")
