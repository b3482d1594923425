"""A tiny site with forty patients, imported once and copied for each test."""

import shutil
from pathlib import Path

import pytest

from client.home import Home
from common.config import Proposal
from tests.tiny_site import PROPOSAL, make_home


@pytest.fixture(scope="session")
def tiny_proposal() -> Proposal:
    return PROPOSAL


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("template")).folder


@pytest.fixture
def tiny_home(tiny_template: Path, tmp_path: Path) -> Home:
    shutil.copytree(tiny_template, tmp_path / "home")
    return Home(tmp_path / "home")
