"""A tiny site with forty patients of noise, and data sets whose pixels say what they are: what many tests share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from client.home import Home, create_home, import_images
from client.intake import Dataset
from client.policy import Policy
from client.site_config import SiteConfig
from common.config import Proposal
from common.messages import Arrays, Kind, Request
from common.models import build
from common.secure_sum import Cohort
from common.weights import get_weights

PROPOSAL = Proposal.model_validate(
    {
        "image": {"size": 28, "classes": ("clear", "opacity")},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "batch_patients": 4, "images_per_patient": 2, "min_patients": 10},
        "warmup": {"share": 0.5},
        "model": {"name": "mlp", "latent_dim": 4, "generator_width": 8, "discriminator_width": 8},
        "train": {"steps_per_round": 2, "generator_batch": 4},
        "federation": {"rounds": 3},
    }
)
TOGETHER = Proposal.model_validate(
    PROPOSAL.model_dump() | {"train": {"algorithm": "secure-sum", "steps_per_round": 1, "generator_batch": 4}}
)
"""The same with secure-sum."""
COHORT = Cohort(3, 120)
POLICY = Policy(site="st-mary", declared_patients=40, max_epsilon=8.0, delta=1e-5, min_patients=10, max_rounds=500)


def make_home(folder: Path, head_copy: Path | None = None) -> Home:
    """Make the site's home in `folder`/home, with its images imported and a copy of its ledger's head if named."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    np.savez(
        folder / "images.npz",
        images=rng.integers(0, 256, (len(patients), 28, 28)).astype(np.uint8),
        patient_id=np.array([f"p{patient}" for patient in patients]),
        labels=np.array(PROPOSAL.image.classes)[patients % 2],
    )
    copy = str(head_copy) if head_copy is not None else None
    home = create_home(folder / "home", SiteConfig(data=str(folder / "images.npz"), head_copy=copy), POLICY)
    import_images(home, PROPOSAL.image.classes, 28, 10)
    return home


def make_weights(proposal: Proposal = PROPOSAL) -> Arrays:
    """Make weights that fit a proposal of two classes."""
    return get_weights(build(proposal.model, proposal.image, 2, torch.Generator().manual_seed(3)))


REFINED = Proposal.model_validate(PROPOSAL.model_dump() | {"warmup": {"share": 0.5, "refinements": 1}})
"""The same with a warm-up of two releases and two rounds of training."""


def warmup_request(run_id: str = "run-1", proposal: Proposal = PROPOSAL) -> Request:
    """Make an honest warm-up request."""
    together = proposal.train.algorithm == "secure-sum"
    settings = {"look": "public", **(COHORT.settings() if together else {})}
    return Request(Kind.WARMUP, run_id, 0, proposal.proposal(), settings)


def train_request(round_: int = 1, run_id: str = "run-1", proposal: Proposal = PROPOSAL) -> Request:
    """Make an honest training request."""
    return Request(Kind.TRAIN, run_id, round_, proposal.proposal(), {"d_steps_per_g_step": 1}, make_weights(proposal))


def gradient_request(
    round_: int = 1, run_id: str = "run-1", proposal: Proposal = TOGETHER, cohort: Cohort = COHORT
) -> Request:
    """Make an honest request for a gradient of D."""
    weights = {name: array for name, array in make_weights(proposal).items() if name.startswith("discriminator.")}
    return Request(Kind.GRADIENT, run_id, round_, proposal.proposal(), cohort.settings(), weights)


def numbered(counts: Sequence[int], size: int = 2) -> Dataset:
    """Make a data set whose pixels say which patient (first) and which of its images (second) an image is."""
    patients = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(patients), 1, size, size), np.uint8)
    images[:, 0, 0, 0] = patients
    images[:, 0, 0, 1] = np.concatenate([np.arange(count) for count in counts])
    return Dataset(images, patients % 2, patients)
