"""What the coordinator ships."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server.bundle import MODULES, build_bundle, bundle_hash

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower uses

ROOT = Path(__file__).resolve().parents[2]


def names() -> set[str]:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as bundle:
        return set(bundle.namelist())


def test_server_only() -> None:
    assert names() == set(MODULES) | {"pyproject.toml", ".info/CONTENT"}
    assert {name.split("/")[0] for name in MODULES} == {"common", "server"}


def test_reproducible() -> None:
    first, second = build_bundle(), build_bundle()
    assert bundle_hash(first) == bundle_hash(second)


@pytest.mark.slow
def test_the_list_is_what_the_server_app_loads() -> None:
    code = (
        "import sys, server.app;"
        "print(*sorted(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('common', 'server')))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = {str(Path(path).relative_to(ROOT)) for path in done.stdout.split()}
    assert loaded == set(MODULES), "server/bundle.py lists what server.app imports: change MODULES"
